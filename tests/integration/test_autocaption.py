"""Clips of which some have no caption go into script/train and come out captioned, whatever interrupts it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lib.serving.registry import PROJECT
from tests.caption_factory import write_captioner
from tests.clips_factory import caption, write_clips
from tests.integration.conftest import wait_for
from tests.training_commands import losses, several, started

pytestmark = pytest.mark.slow

MUTE = ("star-001.mp4", "star-003.mp4")
COMMAND = [
    "input_videos=clips", "autocaption=true", "autocaption_model=talker", "trigger_word=TOK", "rank=4",
    "seed=3", "save_training_state=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("autocaption")
    clips = write_clips(folder / "clips", 4)
    for name in MUTE:
        (clips / name).with_suffix(".txt").unlink()
    write_captioner(folder / "talker", ends=False)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return os.environ | {
        "COGVIDEOX_CACHE": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(PROJECT),
    }  # fmt: skip


@pytest.fixture(scope="module")
def killed(folder, environment) -> str:
    """Kill a run in runs/killed once its captions are written, and return them."""
    record = folder / "runs" / "killed" / "captions.jsonl"
    with started(folder, environment, *COMMAND, "output_dir=runs/killed") as process:
        try:
            wait_for(lambda: record.exists() and record.read_text().count("\n") == len(MUTE), seconds=120)
        finally:
            process.kill()
    return record.read_text()


@pytest.fixture(scope="module")
def outcomes(folder, environment, killed) -> list[tuple[int, str, str]]:
    """The killed run again, one that resumes from its result, one without autocaption, one refused."""
    (folder / "mute").mkdir()
    shutil.copy(folder / "clips" / MUTE[0], folder / "mute")
    return several(
        folder,
        environment,
        [*COMMAND, "max_train_steps=2", "output_dir=runs/killed"],
        [*COMMAND, "max_train_steps=3", "output_dir=runs/next", "resume_from=runs/killed/result"],
        ["input_videos=mute", "output_dir=runs/none"],
        ["input_videos=mute", "output_dir=runs/none", "autocaption=true", "autocaption_model=tiny-t2v"],
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_that_is_killed_after_captioning_captions_nothing_again(folder, killed, outcomes):
    assert outcomes[0][0] == 0, outcomes[0][2]
    assert [row["file_name"] for row in map(json.loads, killed.splitlines())] == list(MUTE)
    assert (folder / "runs" / "killed" / "captions.jsonl").read_text() == killed
    assert len(losses(folder / "runs" / "killed")) == 2


def test_the_result_has_every_caption_as_it_was_made_and_as_it_was_trained(folder, killed, outcomes):
    made = {row["file_name"]: row["caption"] for row in map(json.loads, killed.splitlines())}
    result = folder / "runs" / "killed" / "result"
    raw = {row["file_name"]: row["caption"] for row in rows(result / "autocaptions.jsonl")}
    assert raw == {f"star-{n:03d}.mp4": caption(n) for n in (0, 2)} | made
    assert {row["clip"]: row["caption"] for row in rows(result / "captions.jsonl")} == {
        name: f"TOK {text}" for name, text in raw.items()
    }
    assert len(losses(result)) == 2


def test_a_run_resumed_from_a_result_captions_nothing_again(folder, killed, outcomes):
    assert outcomes[1][0] == 0, outcomes[1][2]
    # What it took from there, and nothing after it.
    assert (folder / "runs" / "next" / "captions.jsonl").read_text() == killed
    first, longer = losses(folder / "runs" / "killed"), losses(folder / "runs" / "next")
    assert longer[:2] == first and len(longer) == 3


def test_without_autocaption_such_clips_are_left_out_and_it_is_named(folder, outcomes):
    status, _, err = outcomes[2]
    assert status == 1
    assert "no caption: write what it shows into star-001.txt" in err
    assert "With autocaption=true a model captions the clips that have no caption." in err
    assert not (folder / "runs" / "none").exists()


def test_a_model_that_captions_nothing_is_refused(outcomes):
    status, _, err = outcomes[3]
    assert status == 1
    assert err.startswith("autocaption_model=tiny-t2v is a model for text-to-video; clips are captioned by")
