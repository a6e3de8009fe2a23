"""A lock between processes: a file next to the path that it guards."""

import fcntl
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lib.cancellation import check_stop
from lib.errors import UserError
from lib.progress import Report, silent
from lib.storage.disk import disk_error, remove

POLL_SECONDS = 0.2


@contextmanager
def lock(
    final: Path, report: Report, *, wait: bool = True, stop: threading.Event | None = None
) -> Iterator[bool]:
    """Hold the lock for writing `final` and yield True, or False when it is taken and `wait` is False.

    The kernel releases the lock when its holder exits or is killed. Raises Stopped when `stop` is set during
    the wait.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(final.name + ".lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                report(f"{final.name}: another process is downloading it; waiting for that")
                _wait_for(handle, stop)
            # The previous holder removed the file: a lock on it would exclude no other process.
            if not path.exists() or os.fstat(handle).st_ino != path.stat().st_ino:
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


@contextmanager
def exclusive(final: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of `final`. Raises UserError with `refusal` if it is taken, and for a disk error."""
    with ExitStack() as stack:
        try:
            held = stack.enter_context(lock(final, silent, wait=False))
        except OSError as error:
            raise disk_error(error, final.parent) from error
        if not held:
            raise UserError(refusal)
        yield


def remove_unused(paths: Iterable[Path]) -> None:
    """Remove files and folders, except those whose lock is held."""
    for path in paths:
        with lock(path, silent, wait=False) as unused:
            if unused:
                remove(path)


def _wait_for(handle: int, stop: threading.Event | None) -> None:
    if stop is None:
        return fcntl.flock(handle, fcntl.LOCK_EX)
    while True:
        check_stop(stop)
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop.wait(POLL_SECONDS)
