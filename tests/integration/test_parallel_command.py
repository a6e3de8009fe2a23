"""script/parallel as people use it: one clip, a list, stopped, killed, with wrong arguments."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from lib.serving.registry import PROJECT
from tests.integration.conftest import wait_for
from tests.video_decoding import decode

COMMAND = (sys.executable, "-P", "-m", "lib.commands.parallel")
QUICK = ("num_inference_steps=2", "seed=5")
PROMPT = "prompt=a red circle moves right on a black background"
PROMPTS = [f"a {colour} circle moves {way}" for colour in ("red", "green", "blue") for way in
           ("left", "right", "up", "down")]  # fmt: skip


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


def started(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, env=environment, text=True, start_new_session=True, **streams
    )


def finished(folder: Path, environment: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    """Status, standard output and standard error."""
    with started(folder, environment, *arguments) as process:
        out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def batch_workers(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "lib.batch.worker" in child.cmdline()]


def clip_workers(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "lib.distributed.worker" in child.cmdline()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, environment) -> Path:
    """Twelve clips by one process, and their list."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "list.txt").write_text("\n".join(PROMPTS))
    status, _, err = finished(
        folder, environment, "t2v", "--processes", "1", "prompts=list.txt", *QUICK, "clips"
    )
    assert status == 0, err
    return folder


@pytest.mark.slow
def test_two_processes_make_the_clip_of_one(tmp_path, environment, alone):
    prompt = f"prompt={PROMPTS[0]}"
    status, out, err = finished(tmp_path, environment, "t2v", "--processes=2", prompt, *QUICK, "clip.mp4")
    assert (status, out) == (0, "clip.mp4\n"), err
    assert "parallel cfg2" in err
    clips = [decode(path).frames.astype(int) for path in (tmp_path / "clip.mp4", alone / "clips/00001.mp4")]
    assert np.abs(clips[0] - clips[1]).mean() < 2  # test_parallel.py compares what is computed
    assert os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.slow
def test_a_list_is_the_same_byte_for_byte_after_one_of_two_processes_was_killed(tmp_path, environment, alone):
    command = ("t2v", "--processes", "2", f"prompts={alone / 'list.txt'}", *QUICK, "clips")
    with started(tmp_path, environment, *command) as process:
        wait_for(lambda: (tmp_path / "clips" / "results.jsonl").exists(), seconds=120)
        batch_workers(process)[0].kill()
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert err.endswith("12 of 12 clips are in clips\n")
    rows = results(tmp_path / "clips")
    assert [(row["row"], row["prompt"], row["status"]) for row in rows] == [
        (number, prompt, "made") for number, prompt in enumerate(PROMPTS, start=1)
    ]
    for row in rows:
        assert (tmp_path / "clips" / row["file"]).read_bytes() == (alone / "clips" / row["file"]).read_bytes()
    assert len(os.listdir(tmp_path / "clips")) == 13


def test_a_second_run_makes_only_what_is_missing(environment, alone):
    clips = alone / "clips"
    before = {path.name: path.stat().st_mtime_ns for path in clips.iterdir()}
    (clips / "00003.mp4").unlink()
    with (alone / "list.txt").open("a") as file:
        file.write("\na red circle stays still")
    command = ("t2v", "--processes", "2", "prompts=list.txt", *QUICK, "clips")
    status, _, err = finished(alone, environment, *command)
    assert status == 0, err
    assert "11 of 13 clips are done already" in err
    after = {path.name: path.stat().st_mtime_ns for path in clips.iterdir()}
    changed = {name for name, time in after.items() if before.get(name) != time}
    assert changed == {"00003.mp4", "00013.mp4", "results.jsonl"}


def test_ctrl_c_keeps_finished_clips_and_nothing_else(tmp_path, environment):
    (tmp_path / "list.txt").write_text("\n".join(PROMPTS))
    slow = ("num_inference_steps=20", "seed=5")
    with started(tmp_path, environment, "t2v", "prompts=list.txt", *slow, "clips") as process:
        wait_for(lambda: (tmp_path / "clips" / "results.jsonl").exists(), seconds=120)
        others = batch_workers(process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("stopped; run the same command again to continue\n")
    assert not any(other.is_running() for other in others)
    made = [row["file"] for row in results(tmp_path / "clips")]
    assert sorted(os.listdir(tmp_path / "clips")) == [*made, "results.jsonl"]


def test_a_failed_row_is_recorded_and_the_others_are_made(tmp_path, environment):
    lines = [{"prompt": "a red circle", "num_frames": 10}, {"prompt": "a red circle"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, _, err = finished(tmp_path, environment, "t2v", "prompts=list.jsonl", *QUICK, "clips")
    assert status == 1
    first, second = results(tmp_path / "clips")
    assert first["status"] == "failed"
    assert first["error"].startswith("num_frames=10 is not supported by tiny-t2v")
    assert second["status"] == "made"
    assert err.endswith("1 of 2 clips are in clips\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t2w", "clip.mp4"], "'t2w' is not t2v or i2v"),
        (["t2v", "clip.avi"], "OUTPUT clip.avi has to end in .mp4 or .webm or .gif; a list of clips needs"),
        (["t2v", PROMPT], "no output is given"),
        (["t2v", "stepz=3", "clip.mp4"], "there is no input 'stepz'."),
        (["t2v", "--processes", "0", "clip.mp4"], "--processes 0 is out of range: 1 to 1024."),
        (["t2v", "prompts=none.txt", "clips"], "prompts=none.txt cannot be read: No such file or directory."),
        (["i2v", PROMPT, "clip.mp4"], "missing: image"),
    ],
)
def test_a_wrong_command_line_is_status_2_before_anything_starts(
    tmp_path, capsys, monkeypatch, arguments, message
):
    from lib.commands.parallel import main

    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_request_that_the_model_does_not_support_is_status_1_and_one_line(tmp_path, environment):
    status, _, err = finished(
        tmp_path, environment, "t2v", "--processes", "2", PROMPT, "num_frames=10", "clip.mp4"
    )
    assert status == 1
    assert "num_frames=10 is not supported by tiny-t2v" in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_of_a_clip(tmp_path, environment):
    command = ("t2v", "--processes", "2", PROMPT, "num_inference_steps=500", "clip.mp4")
    with started(tmp_path, environment, *command) as process:
        for line in process.stderr:
            if "denoising" in line:
                break
        workers = clip_workers(process)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("stopped\n")
    assert len(workers) == 1
    assert psutil.wait_procs(workers, timeout=15)[1] == []
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_killed_worker_is_status_1_and_named(tmp_path, environment):
    command = ("t2v", "--processes", "2", PROMPT, "num_inference_steps=500", "clip.mp4")
    with started(tmp_path, environment, *command) as process:
        for line in process.stderr:
            if "denoising" in line:
                break
        (worker,) = clip_workers(process)
        worker.kill()
        began = time.monotonic()
        _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "Process 2 of 2 was killed by signal 9 (SIGKILL) while it was making the clip." in err
    assert time.monotonic() - began < 60
    assert os.listdir(tmp_path) == []
