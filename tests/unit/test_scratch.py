import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lib.scratch import PREFIX, Scratch


@pytest.fixture(autouse=True)
def temporary_root(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Cancelled(BaseException):
    """What Cog raises in a cancelled request: no Exception."""


def test_a_success_stays_until_the_next_clear():
    scratch = Scratch()
    with scratch.request() as folder:
        (folder / "video.mp4").write_bytes(b"x")
    assert (folder / "video.mp4").exists()
    scratch.clear()
    assert list(scratch.folder.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, Cancelled, KeyboardInterrupt])
def test_a_failed_or_cancelled_request_leaves_nothing(error):
    scratch = Scratch()
    with pytest.raises(error), scratch.request() as folder:
        (folder / "half.mp4").write_bytes(b"x")
        raise error
    assert list(scratch.folder.iterdir()) == []


def test_exit_removes_everything(tmp_path):
    code = "from lib.scratch import Scratch\nwith Scratch().request() as f: (f / 'a').touch()\nprint(f)"
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert not Path(ran.stdout.strip()).exists()
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def test_what_a_killed_process_left_is_removed_and_a_running_ones_is_not(tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    stale, alive = tmp_path / f"{PREFIX}{finished.pid}-abc", tmp_path / f"{PREFIX}{os.getppid()}-abc"
    stale.mkdir()
    alive.mkdir()
    Scratch()
    assert not stale.exists()
    assert alive.exists()
