"""Directories for requests' files: at most the last success's remains, and nothing after shutdown."""

import atexit
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "cogvideox-results-"
# A file system that knows no locks on directories; no process there takes another's folder for stale.
NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EINVAL)


class Scratch:
    """A directory of this process under the system's temporary one, gone at exit.

    Cog reads the returned file after the request's code has ended, so a success's directory stays until
    `clear`; a failed or cancelled request leaves nothing. What killed processes left is removed at start:
    each process holds a lock on its directory for as long as it lives, so one whose lock can be had is
    nobody's. (Process numbers would not tell: containers that share the directory have the same ones.)
    """

    def __init__(self) -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            _remove_if_stale(folder)
        self.folder, self._lock = _locked_folder()
        atexit.register(self._remove, os.getpid())

    def clear(self) -> None:
        """Remove what earlier requests left."""
        for entry in self.folder.iterdir():
            shutil.rmtree(entry, ignore_errors=True)

    @contextmanager
    def request(self) -> Iterator[Path]:
        """A fresh directory, removed unless the block succeeds (cancellation is a BaseException)."""
        # Named before it is made: a cancellation in the middle of making it must know what to remove.
        folder = self.folder / secrets.token_hex(8)
        try:
            folder.mkdir(mode=0o700)
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _remove(self, owner: int) -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(self.folder, ignore_errors=True)


def _locked_folder() -> tuple[Path, int]:
    """A new directory and the open descriptor that holds its lock until the process ends, however it ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # another process took it for stale before it was locked
        _lock(descriptor)
        if folder.is_dir():
            return folder, descriptor
        os.close(descriptor)


def _remove_if_stale(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return  # gone meanwhile, or another user's
    try:
        if _lock(descriptor, wait=False):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = True) -> bool:
    """Whether the lock was had; always after waiting, but on file systems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True
