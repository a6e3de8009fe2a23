"""Disk space: how much is free, sizes as text, and the errors of a disk that is full or cannot be written."""

import errno
import shutil
from pathlib import Path

from lib.errors import UserError


class NoSpaceError(UserError):
    """The disk is too full. What was downloaded so far is valid; only space is missing."""


def size_text(count: int) -> str:
    """Return a number of bytes in decimal units: `size_text(21_300_000_000)` is "21.3 GB"."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def require_free_space(
    path: Path, needed_bytes: int, *, hint: str = ", or choose a folder on another disk"
) -> None:
    """Raise NoSpaceError unless the disk that holds `path`, or will hold it, has `needed_bytes` free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise NoSpaceError(
            f"Not enough room in {folder}: {size_text(needed_bytes)} are needed "
            f"and {size_text(free)} are free. Free some space{hint}, then start again."
        )


def disk_error(error: OSError, path: Path) -> UserError:
    """Return the UserError for a write to `path` that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            f"The disk is full: {path} could not be written. Free some space, then start again."
        )
    return UserError(f"{path} could not be written: {error.strerror or error}.")
