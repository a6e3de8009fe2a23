"""Temporary directories of requests: the last result is kept until it has been read, or until shutdown."""

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
# Errors of file systems without locks on directories; there no folder is ever considered stale.
NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EINVAL)


class Scratch:
    """A directory of this process under the system's temporary one, removed at exit.

    Cog reads the returned file after the request's code has ended, so the directory of a successful request
    stays until `clear`; a failed or cancelled request leaves nothing. The directories of killed processes are
    removed at the next start: each process locks its directory while it lives, so a directory without a
    lock is stale. (Process IDs do not help: containers that share the directory reuse them.)
    """

    def __init__(self) -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            _remove_if_stale(folder)
        self.folder, self._lock = _locked_folder()
        atexit.register(self._remove, os.getpid())

    def clear(self) -> None:
        """Remove the directories of earlier requests."""
        for entry in self.folder.iterdir():
            shutil.rmtree(entry, ignore_errors=True)

    @contextmanager
    def request(self) -> Iterator[Path]:
        """Yield a new directory, removed unless the block succeeds (cancellation is a BaseException)."""
        # The name is chosen first, so that the folder is removed even after a cancellation during mkdir.
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
    """Return a new directory and the open descriptor that holds its lock until the process ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # another process removed it as stale before it was locked
        _lock(descriptor)
        if folder.is_dir():
            return folder, descriptor
        os.close(descriptor)


def _remove_if_stale(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return  # removed meanwhile, or another user's
    try:
        if _lock(descriptor, wait=False):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = True) -> bool:
    """Return whether the lock was taken: always after waiting, except on file systems without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True
