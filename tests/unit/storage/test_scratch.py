import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lib.storage.scratch import PREFIX, Scratch


@pytest.fixture(autouse=True)
def temporary_root(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Cancelled(BaseException):
    """Like the exception of a cancelled request in Cog, not an Exception."""


def test_the_result_of_a_successful_request_stays_until_the_next_clear():
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


def test_a_cancellation_while_the_directory_is_made_leaves_nothing(monkeypatch):
    scratch, mkdir = Scratch(), Path.mkdir

    def made_and_cancelled(path: Path, **options: int) -> None:
        mkdir(path, **options)
        raise Cancelled

    monkeypatch.setattr(Path, "mkdir", made_and_cancelled)
    with pytest.raises(Cancelled), scratch.request():
        pytest.fail("the block ran")
    assert list(scratch.folder.iterdir()) == []


def test_exit_removes_everything(tmp_path):
    code = (
        "from lib.storage.scratch import Scratch\nwith Scratch().request() as f: (f / 'a').touch()\nprint(f)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert not Path(ran.stdout.strip()).exists()
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


OWNER = """
import sys
from lib.storage.scratch import Scratch
print(Scratch().folder, flush=True)
sys.stdin.read()
"""


def test_removes_the_directory_of_a_killed_process_and_not_of_a_running_one(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", OWNER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as owner:
        folder = Path(owner.stdout.readline().strip())
        Scratch()
        assert folder.is_dir()
        owner.kill()
        owner.wait()
        assert folder.is_dir()
        Scratch()
        assert not folder.exists()


def test_a_directory_without_a_lock_is_stale_even_if_its_process_number_is_in_use(tmp_path):
    left = tmp_path / f"{PREFIX}{os.getpid()}"
    (left / "request").mkdir(parents=True)
    other = tmp_path / "cogvideox-server-abc"
    other.mkdir()
    Scratch()
    assert not left.exists()
    assert other.exists(), "only directories with the prefix are removed"


def test_two_scratch_directories_of_one_process_are_independent():
    first, second = Scratch(), Scratch()
    assert first.folder != second.folder
    assert first.folder.is_dir() and second.folder.is_dir()


def test_a_directory_that_was_removed_before_it_was_locked_is_made_again(monkeypatch):
    real, taken = tempfile.mkdtemp, []

    def take_the_first(**options: str) -> str:
        folder = real(**options)
        if not taken:
            taken.append(folder)
            os.rmdir(folder)
        return folder

    monkeypatch.setattr("lib.storage.scratch.tempfile.mkdtemp", take_the_first)
    scratch = Scratch()
    assert scratch.folder.is_dir() and str(scratch.folder) != taken[0]


def test_on_a_file_system_without_locks_no_directory_is_stale(tmp_path, monkeypatch):
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr("lib.storage.scratch.fcntl.flock", refuse)
    other = tmp_path / f"{PREFIX}other"
    other.mkdir()
    assert Scratch().folder.is_dir()
    assert other.exists()
