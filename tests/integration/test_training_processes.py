"""Several processes train like one with their combined batch, and one of them writes."""

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from lib.serving.backend import free_port
from lib.serving.registry import PROJECT
from tests.clips_factory import star_frames, write_clips, zip_of
from tests.training_commands import finished, losses, several, started, wait_for_step
from training import checkpoints

pytestmark = pytest.mark.slow

SETTINGS = ["rank=4", "random_flip=0.5"]

# Imported by every Python that starts: notes what a rank creates, renames and removes, by file name; gives
# the second process another base when asked to.
WITNESS = """
import os, sys

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def witness(event, arguments):
    changes = event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes and isinstance(arguments[0], (str, os.PathLike)):
        os.write(notes, (os.path.abspath(arguments[0]) + "\\n").encode())


if os.environ.get("RANK") == "1" and "BASE_OF_PROCESS_1" in os.environ:
    os.environ["COGVIDEOX_MODEL"] = os.environ["BASE_OF_PROCESS_1"]
if "RANK" in os.environ:
    path = os.path.join(os.environ["NOTES"], "rank-" + os.environ["RANK"])
    notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(witness)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    zip_of(write_clips(folder / "clips", 5), folder / "clips.zip")
    Image.fromarray(star_frames(7)[0]).save(folder / "star.png")
    (folder / "sitecustomize.py").write_text(WITNESS)
    return folder


@pytest.fixture(scope="module")
def environment(folder, tmp_path_factory) -> dict[str, str]:
    return os.environ | {
        "COGVIDEOX_CACHE": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": f"{folder}{os.pathsep}{PROJECT}",
        "NOTES": str(folder),
    }


def two_processes() -> tuple[str, ...]:
    """As `accelerate launch --multi_gpu --num_processes 2 -m training`, on a port of its own."""
    return (
        sys.executable, "-P", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(free_port()), "-m", "training",
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(folder, environment) -> tuple[int, str, str]:
    """A run of two processes that draws its seed itself."""
    return finished(
        folder, environment, "input_videos=clips.zip", "output_dir=both", *SETTINGS, "max_train_steps=4",
        "gradient_accumulation_steps=2", "checkpointing_steps=2", "validation_prompt=a star",
        "validation_images=star.png", "validation_inference_steps=1", launch=two_processes(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(folder, environment, both) -> None:
    """Runs of one process with the double batch: as `both`, without accumulation, the first half of that."""
    seed = checkpoints.read_state(folder / "both" / "checkpoints" / "step-00000004").seed
    double = ["input_videos=clips.zip", *SETTINGS, "train_batch_size=2", f"seed={seed}"]
    outcomes = several(
        folder,
        environment,
        [*double, "output_dir=alone", "gradient_accumulation_steps=2", "max_train_steps=4"],
        [*double, "output_dir=plain", "max_train_steps=6"],
        [*double, "output_dir=half", "max_train_steps=3", "save_training_state=true"],
    )
    assert [status for status, _, _ in outcomes] == [0, 0, 0], outcomes
    with tarfile.open(folder / "half.tar", "w") as tar:
        tar.add(folder / "half" / "result", ".")


def test_two_processes_train_like_one_with_the_double_batch_and_one_of_them_writes(folder, both, alone):
    status, out, err = both
    assert status == 0, err
    assert out == f"{folder / 'both' / 'result' / 'lora.safetensors'}\n"
    assert losses(folder / "both") == pytest.approx(losses(folder / "alone"), rel=1e-5)
    assert err.count("encoding clips") == err.count("training (4)") == 1
    written = {
        rank: [
            Path(line).relative_to(folder / "both")
            for line in (folder / f"rank-{rank}").read_text().splitlines()
            if Path(line).is_relative_to(folder / "both")
        ]
        for rank in (0, 1)
    }
    assert {"checkpoints", "loss.csv", "result", "validation"} <= {
        path.parts[0].removesuffix(".partial") for path in written[0] if path.parts
    }
    assert written[1] == []


def test_two_processes_resume_from_the_output_of_one(folder, environment, alone):
    status, _, err = finished(
        folder, environment, "input_videos=clips", "output_dir=continued", *SETTINGS, "max_train_steps=6",
        "resume_from=half.tar", launch=two_processes(),
    )  # fmt: skip
    assert status == 0, err
    assert "continuing at step 3 of 6" in err and "changed since the checkpoint" not in err
    assert losses(folder / "continued") == pytest.approx(losses(folder / "plain"), rel=1e-5)
    assert not (folder / "continued" / "origin").exists()


def test_an_error_in_another_process_is_reported_with_its_number(folder, environment):
    status, out, err = finished(
        folder, environment | {"BASE_OF_PROCESS_1": "cogvlm2-caption"}, "input_videos=clips",
        "output_dir=odd", *SETTINGS, launch=two_processes(),
    )  # fmt: skip
    assert (status, out) == (1, "")
    reported = [line for line in err.splitlines() if "COGVIDEOX_MODEL=cogvlm2-caption" in line]
    assert len(reported) == 1
    assert reported[0].startswith("process 1: COGVIDEOX_MODEL=cogvlm2-caption is a model for captioning; ")


def test_a_killed_process_ends_the_run_soon(folder, environment):
    with started(
        folder, environment, "input_videos=clips", "output_dir=killed", *SETTINGS, "max_train_steps=5000",
        launch=two_processes(), stderr=subprocess.DEVNULL,
    ) as launcher:  # fmt: skip
        wait_for_step(folder / "killed", 3, launcher)
        children = psutil.Process(launcher.pid).children(recursive=True)
        [doomed] = [child for child in children if child.environ().get("RANK") == "1"]
        doomed.kill()
        since = time.monotonic()
        assert launcher.wait(120) == 1
        assert time.monotonic() - since < 60
        assert not psutil.wait_procs(children, timeout=30)[1]
