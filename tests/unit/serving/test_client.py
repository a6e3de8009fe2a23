"""What the command line makes of inputs, outputs, logs and the server's words."""

import base64
import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from lib.commands import serving
from lib.errors import UserError
from lib.serving.client import _message, _plain_error
from lib.serving.configs import PROJECT
from lib.serving.inputs import describe_inputs, parse_inputs
from lib.serving.outputs import save_output
from lib.serving.schema import openapi_schema
from lib.serving.server import free_port

PREDICTOR = """
from typing import Optional
from cog import BaseRunner, Input, Path
class Runner(BaseRunner):
    def run(
        self,
        prompt: str = Input(description="What to show.", default="a fox"),
        image: Path = Input(description="First frame."),
        steps: int = Input(description="Steps.", default=50, ge=1, le=500),
        scale: float = Input(description="Scale.", default=6, ge=1, le=20),
        loud: bool = Input(description="Loud.", default=False),
        seed: Optional[int] = Input(description="Seed.", default=None),
        fmt: str = Input(description="Format.", choices=["mp4", "gif"], default="mp4"),
        extras: Optional[list[Path]] = Input(description="More.", default=None),
    ) -> Path: ...
""".replace("extras: list[Path]", "extras: Optional[list[Path]]")
IMAGE = "image=https://example.com/a.png"


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "predict_sample.py"
    file.write_text(PREDICTOR)
    return openapi_schema(file)


def test_values_take_the_types_of_the_schema(document):
    pairs = [IMAGE, "steps=7", "scale=7", "loud=True", "seed=-1", "fmt=gif"]
    values = parse_inputs(pairs, document)
    assert values == {
        "image": "https://example.com/a.png",
        "steps": 7,
        "scale": 7.0,
        "loud": True,
        "seed": -1,
        "fmt": "gif",
    }
    assert type(values["scale"]) is float and type(values["steps"]) is int


@pytest.mark.parametrize("text", ["a=b=c", '{"json": 1}', "true", "12", "@someone", '"quoted"', "", " x "])
def test_text_is_kept_as_it_is(document, text):
    assert parse_inputs([IMAGE, f"prompt={text}"], document)["prompt"] == text


def test_an_empty_value_leaves_an_input_out(document):
    assert parse_inputs([IMAGE, "seed=", "steps=", "loud="], document) == {
        "image": "https://example.com/a.png"
    }


def test_a_file_becomes_a_data_uri(document, tmp_path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG")
    uri = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert parse_inputs([f"image=@{photo}"], document)["image"] == uri
    values = parse_inputs([IMAGE, f"extras=@{photo}", "extras=https://example.com/b"], document)
    assert values["extras"] == [uri, "https://example.com/b"]


REFUSED = {
    "steps": "write name=value",
    "promt=a": "there is no input 'promt'. Did you mean prompt? Inputs: prompt, image, steps",
    "zzzzz=a": "there is no input 'zzzzz'. Inputs: prompt, image, steps",
    "steps=many": "steps: many is not a whole number",
    "steps=2.5": "steps: 2.5 is not a whole number",
    "steps=501": "steps: 501 is greater than the maximum of 500",
    "steps=0": "steps: 0 is less than the minimum of 1",
    "scale=big": "scale: big is not a number",
    "scale=nan": "scale: nan is less than the minimum of 1",
    "loud=maybe": "loud: maybe is not true or false",
    "fmt=avi": "fmt: 'avi' is not one of mp4, gif",
    "image=photo.png": "image: write @photo.png to send the file",
    "image=@/nowhere/photo.png": "cannot read /nowhere/photo.png: No such file or directory",
}


@pytest.mark.parametrize("pair", REFUSED)
def test_refuses_before_sending(document, pair):
    with pytest.raises(UserError) as caught:
        parse_inputs([IMAGE, pair], document)
    assert REFUSED[pair] in str(caught.value)


def test_refuses_a_missing_input(document):
    with pytest.raises(UserError, match="missing: image"):
        parse_inputs(["prompt=a"], document)


def test_help_lists_type_range_default_and_description(document):
    text = describe_inputs(document)
    assert "image  (@file or URL, required)\n      First frame." in text
    assert "steps  (whole number, 1..500, default 50)" in text
    assert "seed  (whole number, may be empty)" in text
    assert "fmt  (text, mp4 | gif, default mp4)" in text
    assert text.index("prompt") < text.index("image") < text.index("extras")


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
def test_a_full_disk_leaves_no_half_output_and_says_so(tmp_path, monkeypatch, name):
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


def test_an_output_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def look(partial: Path, path: Path) -> None:
        seen.append((partial.read_bytes(), partial.suffix))
        replace(partial, path)

    monkeypatch.setattr("lib.serving.outputs.os.replace", look)
    (path,) = save_output(uri(b"whole", "video/mp4"), folder=tmp_path)
    assert seen == [(b"whole", ".partial")]
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


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


def test_the_servers_words_are_shown_plainly():
    detail = {
        "loc": ["body", "input", "num_inference_steps"],
        "msg": "501 is greater than the maximum of 500",
    }
    body = json.dumps({"detail": [detail]}).encode()
    assert _message(body) == "num_inference_steps: 501 is greater than the maximum of 500"
    assert _message(b'{"error":"At capacity - all prediction slots busy","status":"failed"}').startswith(
        "At cap"
    )
    assert _message(b"Failed to parse") == "Failed to parse"
    assert (
        _plain_error("Prediction failed: Prediction failed: UserError: width 7: use 720")
        == "width 7: use 720"
    )
    assert _plain_error("Prediction failed: FetchError: nothing at a: b") == "nothing at a: b"
    assert _plain_error("Prediction failed: ValueError: boom") == "ValueError: boom"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "t2v", "-o", "clip.webm", "-i", "output_format=gif"], "does not fit output_format=gif"),
        (["predict", "t2v", "-o", "{folder}"], "is a folder; give a file's path"),
        (["predict", "t2v", "-o", "none/a.mp4"], "--output none/a.mp4: the folder none does not exist"),
        (["predict", "convert", "-i", "dtype=fp8"], "dtype: 'fp8' is not one of auto, float16"),
        (["predict", "convert", "-i", "dtyp=auto"], "there is no input 'dtyp'. Did you mean dtype?"),
        (["predict", "nothing"], "there is no predictor 'nothing'; there are: caption,"),
        (["serve", "t2v", "--port", "99999"], "--port 99999 is out of range: 1 to 65535"),
        (["serve", "convert", "--train"], "convert has no training; those that have: i2v, t2v"),
        (["schema", "nothing"], "there is no predictor 'nothing'; there are: caption,"),
    ],
)
def test_a_wrong_command_line_is_status_2_before_a_server_starts(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert serving.main([word.format(folder=tmp_path) for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_status_1(capsys):
    assert serving.main(["predict", "t2v", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "no server answers at http://127.0.0.1:" in capsys.readouterr().err


def test_the_printed_request_sends_a_file_that_no_argument_could_hold(document, tmp_path):
    photo = os.urandom(200_000)
    (tmp_path / "image.png").write_bytes(photo)
    shell = f"curl() {{ cat; }}\n{serving.curl_example('http://127.0.0.1:5000', document)}"
    sent = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, check=True).stdout
    image = "data:image/png;base64," + base64.b64encode(photo).decode()
    assert json.loads(sent) == {"input": {"prompt": serving.EXAMPLE_PROMPT, "image": image}}


def test_the_ending_of_the_output_chooses_the_format():
    document = openapi_schema(PROJECT / "predict_t2v.py")
    inputs = {}
    serving._match_format(inputs, Path("clip.WEBM"), document)
    assert inputs == {"output_format": "webm"}
    serving._match_format(inputs, Path("clip.dat"), document)
    assert inputs == {"output_format": "webm"}
