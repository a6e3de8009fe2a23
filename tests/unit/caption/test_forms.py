"""Captions in the forms that trainers read, and what find_clips gets from them again."""

import json
import threading
import zipfile
from pathlib import Path

import pytest

from lib.cancellation import Stopped
from lib.caption.forms import all_forms, pack, sidecar_names
from lib.datasets.dataset import Clip, LeftOut, find_clips
from lib.storage.archive import extract_archive
from lib.storage.disk import NoSpaceError

AWKWARD = {
    "a.mp4": "a ball", "a.mov": "another ball", "A.gif": "a ball in capitals", "b.mp4": "plain",
    "b.mp4.mp4": "called like the sidecar of another", "deep/a.mp4": "in a folder",
    "deep/er/ü n.mp4": "zwei Wörter",
    "deep/e\u0301.mp4": "decomposed", "deep/\u00e9.mp4": "composed", "prompts.mp4": "called like a list",
    "videos.mp4": "another", "lines.mp4": "one\n\n two\r\nthree\u2028four", "folder.txt/c.mp4": "odd folder",
    "folder.mp4": "beside it", "quoted.mp4": 'she says "no", {then}', "back\\slash.mp4": "of another system",
    "blank .mp4": "a blank in front of the ending",
}  # fmt: skip


def clips_in(folder: Path, captions: dict[str, str]) -> list[Clip]:
    """Files that pass for videos where nothing is decoded."""
    clips = []
    for name, caption in sorted(captions.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        clips.append(Clip(path=path, name=name, caption=caption))
    return clips


def written(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")


def captions_of(folder: Path) -> dict[str, str]:
    clips, left_out = find_clips(folder)
    assert left_out == []
    return {clip.name: clip.caption for clip in clips}


@pytest.mark.parametrize(
    "forms",
    [
        ("metadata.jsonl",), ("prompts.txt", "videos.txt"), (".txt",),
        (".txt", "metadata.jsonl", "prompts.txt", "videos.txt"),
    ],
    ids=lambda forms: "+".join(forms),
)  # fmt: skip
def test_each_form_alone_and_all_together_give_the_captions_again(tmp_path, forms):
    clips = clips_in(tmp_path, AWKWARD)
    texts = all_forms(clips, [])
    listings = {"metadata.jsonl", "prompts.txt", "videos.txt"}
    sidecars = set(texts) - listings
    assert len(sidecars) == len(clips), "no clip's caption is written over another's"
    wanted = {name for name in texts if name in forms or (".txt" in forms and name in sidecars)}
    written(tmp_path, {name: texts[name] for name in wanted})
    expected = AWKWARD if "prompts.txt" not in forms[:1] else AWKWARD | {"lines.mp4": "one two three four"}
    assert captions_of(tmp_path) == expected


def test_lists_have_a_line_for_each_clip_whatever_its_caption_and_name(tmp_path):
    texts = all_forms(clips_in(tmp_path, {"a.mp4": "one\ntwo", "b\nc.mp4": "three"}), [])
    assert texts["prompts.txt"] == "one two\nthree\n"
    assert texts["videos.txt"] == "a.mp4\nb c.mp4\n"
    assert [json.loads(line) for line in texts["metadata.jsonl"].splitlines()] == [
        {"file_name": "a.mp4", "text": "one\ntwo"},
        {"file_name": "b\nc.mp4", "text": "three"},
    ]


def test_a_sidecar_is_called_after_its_clip_unless_another_could_be_meant():
    assert sidecar_names(["x.mp4", "d/x.mov", "d/X.mp4", "d/y.mp4", "d/videos.gif"]) == {
        "x.mp4": "x.txt",
        "d/x.mov": "d/x.mov.txt",
        "d/X.mp4": "d/X.mp4.txt",
        "d/y.mp4": "d/y.txt",
        "d/videos.gif": "d/videos.gif.txt",
    }


def test_a_sidecar_ends_in_one_line_break_and_errors_have_a_row_each(tmp_path):
    bad = [
        LeftOut(name="bad.mp4", reason="it is empty"),
        LeftOut(name="metadata.csv, line 3", reason="no file"),
    ]
    texts = all_forms(clips_in(tmp_path, {"a.mp4": "a ball"}), bad)
    assert texts["a.txt"] == "a ball\n"
    assert texts["errors.jsonl"].splitlines() == [
        '{"file_name": "bad.mp4", "error": "it is empty"}',
        '{"file_name": "metadata.csv, line 3", "error": "no file"}',
    ]
    assert "errors.jsonl" not in all_forms(clips_in(tmp_path, {"a.mp4": "a ball"}), [])


def test_a_zip_holds_the_clips_as_they_are_and_is_the_same_each_time(tmp_path):
    clips = clips_in(tmp_path / "in", AWKWARD)
    one, other = (pack(clips, [], tmp_path / name, videos=True) for name in ("one.zip", "other.zip"))
    assert one.read_bytes() == other.read_bytes()
    with zipfile.ZipFile(one) as archive:
        kinds = {entry.filename: entry.compress_type for entry in archive.infolist()}
    assert {kind for name, kind in kinds.items() if name in AWKWARD} == {zipfile.ZIP_STORED}
    folder = extract_archive(one, tmp_path / "out")
    # A zip knows no backslashes in names: there they part folders.
    assert captions_of(folder) == {name.replace("\\", "/"): text for name, text in AWKWARD.items()}
    assert all(
        (folder / clip.name.replace("\\", "/")).read_bytes() == clip.path.read_bytes() for clip in clips
    )


def test_a_zip_without_videos_holds_the_texts_alone(tmp_path):
    path = pack(clips_in(tmp_path, {"a.mp4": "a ball"}), [], tmp_path / "out.zip", videos=False)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["metadata.jsonl", "prompts.txt", "videos.txt", "a.txt"]


def test_half_a_surrogate_pair_in_a_kept_caption_does_not_end_the_run(tmp_path):
    path = pack(clips_in(tmp_path, {"a.mp4": "odd \ud83d"}), [], tmp_path / "out.zip", videos=False)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("a.txt") == b"odd ?\n"


def test_a_stop_or_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    clips = clips_in(tmp_path / "in", {"a.mp4": "a ball"})
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        pack(clips, [], tmp_path / "out.zip", videos=True, stop=stop)

    def full(path, needed_bytes, **_):
        raise NoSpaceError("no room")

    monkeypatch.setattr("lib.caption.forms.require_free_space", full)
    with pytest.raises(NoSpaceError, match="no room"):
        pack(clips, [], tmp_path / "out.zip", videos=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
