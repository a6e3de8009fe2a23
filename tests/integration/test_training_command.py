"""script/train as a user runs it: settings, sources, refusals, Ctrl-C, kills, resuming."""

import fcntl
import os
import pty
import random
import re
import signal
import subprocess
import sys
import tarfile
import termios
from pathlib import Path

import pytest

from lib.serving.registry import PROJECT
from lib.storage.lock import lock
from tests.clips_factory import write_clips, zip_of
from tests.http_host import Host, Served
from tests.training_commands import finished, losses, several, started, wait_for_step
from training.config import all_settings

STEPS = 45
SETTINGS = ["rank=4", "seed=3"]
LONG = [*SETTINGS, f"max_train_steps={STEPS}", "checkpointing_steps=7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The working directory of the commands, with clips as a folder, a zip and a tar."""
    folder = tmp_path_factory.mktemp("command")
    clips = write_clips(folder / "clips")
    zip_of(clips, folder / "clips.zip")
    with tarfile.open(folder / "clips.tar", "w") as tar:
        tar.add(clips, "clips")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return os.environ | {
        "COGVIDEOX_CACHE": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(PROJECT),
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder, environment) -> list[tuple[int, str, str]]:
    """Short runs from each kind of source."""
    short = [*SETTINGS, "max_train_steps=3"]
    return several(
        folder,
        environment,
        ["input_videos=clips", "output_dir=runs/folder", *short],
        ["input_videos=@clips.zip", "output_dir=runs/zip", *short],
        [f"input_videos={folder}/clips.tar", "output_dir=runs/tar", *short],
    )


# The command line


def test_help_lists_every_setting(folder, environment):
    status, out, _ = finished(folder, environment, "--help")
    assert status == 0
    assert "output_dir=" in out and "accelerate launch" in out
    for _, each in all_settings():
        assert f"\n  {each.name}  (" in out
    assert finished(folder, environment)[:2] == (2, out)


def test_the_help_and_refused_settings_do_not_wait_for_torch(folder, environment):
    code = "import sys; from training.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for argument in ("--help", "rank=0"):
        command = [sys.executable, "-P", "-c", code, argument]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.splitlines()[-1] == "False", done.stderr


WRONG = {
    "an unknown setting": ("learning_rat=1", "learning_rate"),
    "out of range": ("rank=0", "rank: 0 is less than the minimum of 1"),
    "no number": ("rank=four", "rank: four is not a whole number"),
    "a wrong choice": ("optimizer=sgd", "optimizer: "),
    "settings that exclude each other": (
        "dataset_name=me/clips",
        "give the clips with input_videos (an archive or folder) or dataset_name, one of the two",
    ),
    "no setting at all": ("clips.zip", "'clips.zip' is not setting=value; usage: script/train input_videos="),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_is_refused_at_once(folder, environment, case):
    argument, message = WRONG[case]
    status, out, err = finished(folder, environment, "input_videos=clips", argument)
    assert (status, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert not (folder / "runs" / "lora").exists()


@pytest.fixture(scope="module")
def unbroken(folder, environment) -> list[float]:
    """The losses of a long run that nothing interrupts."""
    [(status, _, err)] = several(
        folder, environment, ["input_videos=clips", "output_dir=runs/unbroken", *LONG]
    )
    assert status == 0, err
    found = losses(folder / "runs" / "unbroken")
    assert len(found) == STEPS
    return found


def test_a_folder_a_zip_and_a_tar_train_the_same(folder, trained):
    for status, out, err in trained:
        assert status == 0, err
        assert Path(out.strip()).is_file()
    assert [Path(out.strip()).relative_to(folder) for _, out, _ in trained] == [
        Path("runs", name, "result", "lora.safetensors") for name in ("folder", "zip", "tar")
    ]
    expected = losses(folder / "runs" / "folder")
    assert len(expected) == 3
    for name in ("folder", "zip", "tar"):
        assert losses(folder / "runs" / name) == expected
        left = sorted(path.name for path in (folder / "runs" / name).iterdir())
        assert left == ["checkpoints", "loss.csv", "result"]


def test_impossible_settings_are_refused_and_the_earlier_result_stays(folder, environment, trained):
    again = ["input_videos=clips", "output_dir=runs/folder", *SETTINGS]
    result = folder / "runs" / "folder" / "result" / "lora.safetensors"
    before = result.read_bytes()
    (folder / "taken").write_bytes(b"")
    cases = {
        "has 3 steps already and this run ends at 3": [*again, "max_train_steps=3"],
        "does not fit: rank (it has 4, this run 8)": [*again, "rank=8"],
        "missing.zip does not exist": ["input_videos=missing.zip", "output_dir=runs/none"],
        "taken could not be written": ["input_videos=clips", "output_dir=taken"],
        "clips has neither a training state nor lora.safetensors": [
            "input_videos=clips", "output_dir=runs/none", "resume_from=clips",
        ],
        "another process is training in busy; wait for it": ["input_videos=clips", "output_dir=runs/busy"],
    }  # fmt: skip
    with lock(folder / "runs" / "busy", print):
        outcomes = several(folder, environment, *cases.values())
    for message, (status, out, err) in zip(cases, outcomes, strict=True):
        assert (status, out) == (1, "")
        assert message in err and "Traceback" not in err
    assert result.read_bytes() == before


def test_a_base_of_the_wrong_kind_is_refused_before_any_request(folder, environment):
    with Host({"/earlier.tar": Served(b"x")}) as host:
        command = ["input_videos=clips", "output_dir=runs/caption", "hub_model_id=me/star", "hub_token=x"]
        variables = {"COGVIDEOX_MODEL": "cogvlm2-caption", "HF_ENDPOINT": host.address}
        [(status, _, err)] = several(
            folder, environment, [*command, f"resume_from={host.url('/earlier.tar')}"], **variables
        )
    assert status == 1
    assert "COGVIDEOX_MODEL=cogvlm2-caption is a model for" in err
    assert "cogvideox-5b-i2v" in err
    assert host.requests == []


# Stopped, killed, and the same command again


def controlling_terminal() -> None:
    """Make standard error this process's terminal, from which Ctrl-C comes."""
    fcntl.ioctl(2, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_the_same_command_resumes_exactly(folder, environment, unbroken):
    run = folder / "runs" / "stopped"
    command = ["input_videos=clips", "output_dir=runs/stopped", *LONG]
    master, terminal = pty.openpty()
    with started(
        folder, environment, *command,
        stdout=subprocess.PIPE, stderr=terminal, start_new_session=True, preexec_fn=controlling_terminal,
    ) as process:  # fmt: skip
        os.close(terminal)
        wait_for_step(run, 3, process)
        os.write(master, b"\x03")
        shown = read_terminal(master)
        out = process.communicate(timeout=120)[0]
    assert (process.returncode, out) == (130, "")
    assert re.search(r"training \[#*\.+\] \d+/45(, \d:\d\d left)?, loss 0\.\d{4}", shown)
    assert "stopping after this step" in shown
    assert f"stopped; the same command resumes from the checkpoint in {run}" in shown
    assert "Traceback" not in shown
    done = losses(run)
    assert f"step-{len(done):08d}" in [path.name for path in (run / "checkpoints").iterdir()]
    assert 3 <= len(done) < STEPS
    status, _, err = finished(folder, environment, *command)
    assert status == 0, err
    assert f"continuing at step {len(done)} of {STEPS}" in err
    assert losses(run) == unbroken


def read_terminal(master: int) -> str:
    """Everything that is written to the terminal until its last writer has gone."""
    pieces = []
    try:
        while piece := os.read(master, 1 << 16):
            pieces.append(piece)
    except OSError:  # how Linux reports that the other end is closed
        pass
    finally:
        os.close(master)
    return b"".join(pieces).decode()


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_losses_of_an_unbroken_run(folder, environment, unbroken):
    run = folder / "runs" / "killed"
    command = ["input_videos=clips", "output_dir=runs/killed", *LONG]
    rng, reached = random.Random(7), 0
    for _ in range(3):
        with started(folder, environment, *command, stderr=subprocess.DEVNULL) as process:
            wait_for_step(run, reached + rng.randint(1, 10), process)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        kept = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-????????")]
        reached = max(kept, default=0)
        assert len(losses(run)) - reached <= 7
    status, _, err = finished(folder, environment, *command)
    assert status == 0, err
    assert losses(run) == unbroken == losses(run / "result")
