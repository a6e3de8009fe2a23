"""Directories for requests' files: at most the last success's remains, and nothing after shutdown."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "cogvideox-"


class Scratch:
    """A directory of this process under the system's temporary one, gone at exit.

    Cog reads the returned file after the request's code has ended, so a success's directory stays until
    `clear`; a failed or cancelled request leaves nothing. What killed processes left is removed at start.
    """

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        for stale in root.glob(f"{PREFIX}*-*"):
            owner = stale.name.removeprefix(PREFIX).split("-")[0]
            if owner.isdigit() and not _is_running(int(owner)):
                shutil.rmtree(stale, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove what earlier requests left."""
        for entry in self.folder.iterdir():
            shutil.rmtree(entry, ignore_errors=True)

    @contextmanager
    def request(self) -> Iterator[Path]:
        """A fresh directory, removed unless the block succeeds (cancellation is a BaseException)."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
