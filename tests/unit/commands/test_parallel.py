"""script/parallel on a machine with GPUs, of which the tests have none."""

import os
import signal
from pathlib import Path

import pytest

from lib.commands import parallel as command

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The signals and variables of the tests' own process, which a command changes."""
    for name in ("COGVIDEOX_LOCAL_SOURCES", "COGVIDEOX_PARALLEL", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_more_processes_than_gpus_are_refused_before_any_is_started(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_count_gpus", lambda: 2)  # none can exist here
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    one = ["t2v", "--processes", "3", "prompt=a red circle", str(tmp_path / "clip.mp4")]
    many = ["t2v", "--processes", "3", f"prompts={tmp_path / 'prompts.txt'}", str(tmp_path / "clips")]
    for arguments in (one, many):
        assert command.main(arguments) == 1
        assert capsys.readouterr().err == "--processes 3 needs 3 GPUs; this machine has 2 GPUs.\n"
    assert not (tmp_path / "clips").exists()
