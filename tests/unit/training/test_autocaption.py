"""Clips without a caption get one, once, however often a run is stopped and resumed."""

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.cancellation import Stopped
from lib.datasets.clips import LeftOut, find_clips
from lib.errors import UserError
from tests import training_factory as factory
from tests.caption_factory import write_captioner
from tests.clips_factory import write_clips
from training import autocaption as module
from training import checkpoints
from training.autocaption import as_lines, write_captions

ALONE = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0)
MUTE = ("star-001.mp4", "star-002.mp4", "star-003.mp4")


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("models") / "talker", ends=False)


@pytest.fixture
def clips(tmp_path) -> Path:
    """Four clips, of which the first has a caption."""
    folder = write_clips(tmp_path / "clips", 4)
    for name in MUTE:
        (folder / name).with_suffix(".txt").unlink()
    return folder


def captioned(
    clips: Path, run: Path, captioner: Path | str, *, origin=None, stop=None, report=print, **settings
):
    """What write_captions returns for a folder of clips."""
    config, plan = factory.config_and_plan(autocaption=True, autocaption_model=str(captioner), **settings)
    found, left_out = find_clips(clips, need_captions=False)
    return write_captions(
        config.data,
        plan,
        found,
        left_out,
        run,
        ALONE,
        origin=origin,
        stop=stop or threading.Event(),
        report=report,
    )


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def test_clips_without_a_caption_get_one_and_others_keep_theirs(tmp_path, clips, captioner):
    lines = []
    made, left_out, rows = captioned(clips, tmp_path / "run", captioner, report=lines.append)
    assert [clip.name for clip in made] == ["star-000.mp4", *MUTE] and left_out == []
    assert made[0].caption == "a magenta star circles on black"
    assert all(len(clip.caption.split()) == 20 for clip in made[1:])  # what the base reads
    assert [row.caption for row in rows] == [clip.caption for clip in made]
    assert [row.status for row in rows] == ["kept", "captioned", "captioned", "captioned"]
    assert lines[0].startswith("captioning with talker on cpu in float32 (")
    assert lines[-4:] == [
        "3 of 3 clips without a caption are captioned, 3 of them cut off at 20 tokens:",
        *(f"  {clip.name}: {clip.caption}" for clip in made[1:]),
    ]
    assert captioned(clips, tmp_path / "other", captioner)[0] == made


def test_a_resumed_run_reuses_its_captions(tmp_path, clips, captioner):
    moved = shutil.copytree(captioner, tmp_path / "talker")
    first, lines = captioned(clips, tmp_path / "run", moved), []
    emptied(moved)  # it is not even opened
    assert captioned(clips, tmp_path / "run", moved, report=lines.append) == first
    assert lines[0] == "3 of 3 clips without a caption were captioned by an earlier run"


def test_a_run_resumed_from_an_output_reuses_and_copies_its_captions(tmp_path, clips, captioner):
    origin = tmp_path / "origin"
    origin.mkdir()
    first = captioned(clips, tmp_path / "run", captioner)
    (origin / checkpoints.CAPTIONS).write_text(as_lines(first[2]))
    gone = emptied(tmp_path / "talker")
    assert captioned(clips, tmp_path / "next", gone, origin=origin) == first
    assert captioned(clips, tmp_path / "next", gone) == first


def test_another_prompt_makes_new_captions(tmp_path, clips, captioner):
    first, _, _ = captioned(clips, tmp_path / "run", captioner)
    other, _, _ = captioned(clips, tmp_path / "run", captioner, autocaption_prompt="What shape is it?")
    assert other[0] == first[0]
    assert all(mine.caption != others.caption for mine, others in zip(first[1:], other[1:], strict=True))


def test_a_stop_between_batches_loses_nothing(tmp_path, clips, captioner, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 1)
    unbroken = captioned(clips, tmp_path / "unbroken", captioner)
    stop, lines = threading.Event(), []

    def report(line: str) -> None:
        if line.startswith("progress: captioning 1/3"):
            stop.set()

    with pytest.raises(Stopped):
        captioned(clips, tmp_path / "run", captioner, stop=stop, report=report)
    with (tmp_path / "run" / "captions.jsonl").open("a") as file:
        file.write('{"file_name": "star-0')  # what a kill leaves
    assert captioned(clips, tmp_path / "run", captioner, report=lines.append) == unbroken
    assert lines[0] == "1 of 3 clips without a caption were captioned by an earlier run"
    assert [line.split(",")[0] for line in lines if "progress" in line] == [
        "progress: captioning 1/2", "progress: captioning 2/2",
    ]  # fmt: skip
    lines = (tmp_path / "run" / "captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines if line.endswith("}")] == list(MUTE)


def test_a_clip_that_cannot_be_captioned_is_left_out_with_the_reason(tmp_path, clips, captioner):
    (clips / MUTE[0]).write_bytes(b"no video")
    made, left_out, rows = captioned(clips, tmp_path / "run", captioner)
    assert [clip.name for clip in made] == ["star-000.mp4", *MUTE[1:]]
    assert left_out == [LeftOut(name=MUTE[0], reason=f"no caption: {rows[1].error}")]
    assert rows[1].status == "failed" and rows[1].error.startswith(f"video {MUTE[0]} ")


def test_no_usable_clip_is_an_error(tmp_path, captioner):
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"no clip can be used:\n  a\.mp4: no caption: video a\.mp4 "):
        captioned(clips, tmp_path / "run", captioner)


@pytest.mark.parametrize(
    "row",
    [
        '{"file_name": "a.mp4", "status": "captioned", "caption": 5, "fingerprint": "mark"}',
        '{"file_name": "a.mp4", "status": "captioned", "caption": "\\ud800", "fingerprint": "mark"}',
        '{"file_name": "a.mp4", "status": "captioned", "caption": " ", "fingerprint": "mark"}',
        '{"file_name": "a.mp4", "status": "captioned", "caption": "of another file"}',
        '{"file_name": "a.mp4", "status": "failed", "error": "no", "fingerprint": "mark"}',
        '{"file_name": ["a.mp4"], "status": "captioned"}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_rows_of_an_output_are_used_only_if_they_are_captions_of_the_same_clip(tmp_path, row):
    text = f"{row}\n".encode(errors="surrogateescape")
    (tmp_path / checkpoints.CAPTIONS).write_bytes(text)
    assert module.known_rows(tmp_path / "run", tmp_path, {"a.mp4": "mark"}) == {}
    assert not (tmp_path / "run").exists()


def test_a_captioner_that_cannot_be_loaded_is_reported_with_the_setting(
    tmp_path, clips, captioner, monkeypatch
):
    monkeypatch.setenv("COGVIDEOX_QUANTIZATION", "fp8")
    with pytest.raises(UserError, match=r"autocaption with talker: COGVIDEOX_QUANTIZATION=fp8"):
        captioned(clips, tmp_path / "run", captioner)
