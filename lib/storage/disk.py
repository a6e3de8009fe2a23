"""Disks: free space, sizes as text, writing in one step, and the errors of one that is full or read-only."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def replacing(target: Path, *, partial: Path | None = None) -> Iterator[Path]:
    """Yield a path for a new file or folder, which becomes `target` when the block ends without an error.

    It is `target.partial` by default. What a killed process left there is removed first. Raises UserError for
    a disk error.
    """
    partial = partial or partial_path(target)
    try:
        remove(partial)
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        remove(partial)


def link_or_copy(file: Path, target: Path) -> None:
    """Make `target` a hard link to a file, or a copy on another disk. Raises NoSpaceError."""
    try:
        os.link(file.resolve(), target)
    except OSError:  # another disk, or a file system without links
        require_free_space(target, file.stat().st_size)
        shutil.copyfile(file, target)


def partial_path(target: Path) -> Path:
    """Return where a file or folder is written until it is complete."""
    return target.with_name(f"{target.name}.partial")


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
