"""The trainer's command, started as a user does, and its results."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.clips_factory import losses_in

TRAIN = (sys.executable, "-P", "-m", "training")
# Several commands in one process, so that torch is imported once.
SEVERAL = """
import contextlib, io, json, os, sys
from training.__main__ import main

for variables, arguments in json.load(sys.stdin):
    os.environ.update(variables)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    for name in variables:
        del os.environ[name]
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


def started(
    folder: Path,
    environment: dict[str, str],
    *arguments: str,
    launch: tuple[str, ...] = TRAIN,
    **streams: Any,
) -> subprocess.Popen:
    """Start a training with `folder` as working directory; `launch` comes before its arguments."""
    return subprocess.Popen([*launch, *arguments], cwd=folder, env=environment, text=True, **streams)


def finished(
    folder: Path, environment: dict[str, str], *arguments: str, launch: tuple[str, ...] = TRAIN
) -> tuple[int, str, str]:
    """Run a training; returns its status, standard output and standard error."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(folder, environment, *arguments, launch=launch, **streams) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def several(
    folder: Path, environment: dict[str, str], *commands: list[str], **variables: str
) -> list[tuple[int, str, str]]:
    """Run several commands in one process with additional environment `variables`."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SEVERAL],
        input=json.dumps([[variables, command] for command in commands]),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def losses(run: Path) -> list[float]:
    return losses_in((run / "loss.csv").read_text())


def wait_for_step(run: Path, steps: int, process: subprocess.Popen) -> None:
    """Wait until a run has done this many steps."""
    deadline = time.monotonic() + 60
    while not (run / "loss.csv").exists() or (run / "loss.csv").read_text().count("\n") <= steps:
        assert process.poll() is None, f"it ended before step {steps}"
        assert time.monotonic() < deadline, f"no step {steps}"
        time.sleep(0.01)
