import base64
import errno
import os
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.serving.outputs import save_output
from tests.http_host import Host, Served


def uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("video/mp4", "output.mp4"),
        ("video/webm", "output.webm"),
        ("image/gif", "output.gif"),
        ("application/x-tar", "output.tar"),
        ("text/plain", "output.txt"),
        ("application/octet-stream", "output.bin"),
    ],
)
def test_outputs_are_named_by_their_type(tmp_path, kind, name):
    assert save_output(uri(b"x", kind), folder=tmp_path) == [tmp_path / name]


def test_outputs_never_overwrite_unless_named(tmp_path):
    for number in range(3):
        save_output(uri(str(number).encode(), "video/mp4"), folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.1.mp4", "output.2.mp4", "output.mp4"]
    assert [(tmp_path / f"output{n}.mp4").read_text() for n in ("", ".1", ".2")] == ["0", "1", "2"]
    named = tmp_path / "mine.mp4"
    for content in (b"old", b"new"):
        assert save_output(uri(content, "video/mp4"), target=named) == [named]
    assert named.read_bytes() == b"new"


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert save_output("a caption", target=tmp_path / "pipe") == []
    assert (os.read(reader, 100), (tmp_path / "pipe").is_fifo()) == (b"a caption\n", True)
    os.close(reader)


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("caption.txt")
    for words in ("old", "new"):
        assert save_output(words, target=tmp_path / "link") == [tmp_path / "link"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "caption.txt").read_text() == "new\n"


@pytest.mark.parametrize("name", [None, "mine.mp4"])
def test_a_full_disk_leaves_no_partial_output_and_is_reported(tmp_path, monkeypatch, name):
    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "mine.mp4").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*\.mp4: No space left on device"):
        save_output(uri(b"new", "video/mp4"), folder=tmp_path, target=name and tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.mp4"]
    assert (tmp_path / "mine.mp4").read_text() == "old"


def test_an_output_appears_under_its_name_when_it_is_complete(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def look(partial: Path, path: Path) -> None:
        seen.append((partial.read_bytes(), partial.suffix))
        replace(partial, path)

    monkeypatch.setattr("lib.serving.outputs.os.replace", look)
    (path,) = save_output(uri(b"complete", "video/mp4"), folder=tmp_path)
    assert seen == [(b"complete", ".partial")]
    assert path.read_bytes() == b"complete" and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_at_the_last_moment_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lib.serving.outputs.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_output(uri(b"x", "video/mp4"), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_text_and_objects_are_printed_and_their_files_saved(tmp_path, capsys):
    assert save_output("a caption") == []
    output = {"caption": "words", "weights": uri(b"w", "application/x-tar")}
    assert save_output(output, folder=tmp_path) == [tmp_path / "output.tar"]
    shown = capsys.readouterr().out
    assert shown.startswith("a caption\n") and '"caption": "words"' in shown
    assert len(save_output([uri(b"1", "image/gif"), uri(b"2", "image/gif")], folder=tmp_path)) == 2


def test_a_damaged_output_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not valid base64"):
        save_output("data:video/mp4;base64,@@@", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_address_is_downloaded(tmp_path):
    with Host({"/clip.mp4": Served(b"video")}) as host:
        assert save_output(host.url("/clip.mp4?signature=a.b"), folder=tmp_path) == [tmp_path / "output.mp4"]
        with pytest.raises(UserError, match=r"cannot download the output: .*404"):
            save_output(host.url("/none.mp4"), folder=tmp_path)
    assert (tmp_path / "output.mp4").read_bytes() == b"video"
