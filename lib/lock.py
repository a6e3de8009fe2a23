"""One process at a time: a lock file beside what it guards."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock(final: Path, report: Callable[[str], None], *, wait: bool = True) -> Iterator[bool]:
    """Hold the right to download `final`; False when another process has it and it is not waited for.

    The kernel gives it back when its holder dies, however it dies.
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
                fcntl.flock(handle, fcntl.LOCK_EX)
            # Its last holder removed the file: who waited on it holds a lock that nobody else sees.
            if not path.exists() or os.fstat(handle).st_ino != path.stat().st_ino:
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)
