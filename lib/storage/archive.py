"""Zip and tar archives, unpacked so that nothing is written outside the target folder."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from lib.cancellation import check_stop
from lib.errors import UserError, shown
from lib.storage import tar_archive, zip_archive
from lib.storage.disk import replacing, require_free_space, size_text
from lib.storage.member import Member

MAX_MEMBERS = 20_000
"""More than any checkpoint or data set has: many small files take time and inodes, not bytes."""
UNPACKED_PER_ARCHIVE_BYTE, UNSUSPICIOUS_BYTES = 100, 1 << 30
"""Videos and weights do not compress: what unpacks to over 1 GiB and over 100 times its size is a bomb."""

Stop = threading.Event | None


def extract_archive(archive: Path, target: Path, *, max_bytes: int | None = None, stop: Stop = None) -> Path:
    """Unpack a zip or tar, recognized by its content, into the new folder `target` and return it.

    `target` appears only when everything is unpacked: until then the files are in `target.partial`, which is
    removed when anything goes wrong. Modes and owners are dropped. At most MAX_MEMBERS members are
    unpacked, and at most the larger of 1 GiB and 100 times the archive's size. The sizes in a zip are checked
    before anything is written, and no member is written past its announced size.

    Raises:
        UserError: `target` exists; the archive is unreadable or larger than `max_bytes` unpacked; or a member
            is absolute, contains `..`, appears twice, or is a link, a device or a pipe. Of a zip, also when
            a member is encrypted, compressed with anything but deflate, or not as long as announced.
        NoSpaceError: the disk is full.
        Stopped: `stop` was set; checked between members and blocks.
    """
    kind = archive_kind(archive)
    if kind is None:
        raise UserError(
            f"{archive.name} is neither a zip nor a tar archive. Pack the files as .zip, .tar, .tar.gz, "
            ".tar.bz2 or .tar.xz."
        )
    return _extract(kind, archive, target, max_bytes=max_bytes, stop=stop)


def extract_tar(archive: Path, target: Path, *, max_bytes: int | None = None, stop: Stop = None) -> Path:
    """Unpack a tar archive, compressed or not, as extract_archive does."""
    return _extract("tar", archive, target, max_bytes=max_bytes, stop=stop)


def archive_kind(path: Path) -> str | None:
    """Return "zip" or "tar" by the first bytes of the file, None for anything else."""
    if zip_archive.is_zip(path):
        return "zip"
    return "tar" if tar_archive.is_tar(path) else None


def _extract(kind: str, archive: Path, target: Path, *, max_bytes: int | None, stop: Stop) -> Path:
    limit = max(UNSUSPICIOUS_BYTES, UNPACKED_PER_ARCHIVE_BYTE * archive.stat().st_size)
    max_bytes = limit if max_bytes is None else min(limit, max_bytes)
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; {archive.name} is not unpacked over it.")
    with replacing(target) as partial:
        partial.mkdir(parents=True)
        if kind == "zip":
            with zip_archive.opened(archive) as file:
                members = zip_archive.members(file, archive)
                _check_limits(archive, len(members), sum(each.size for each in members), max_bytes)
                require_free_space(partial, sum(each.size for each in members))
                _write(members, archive, partial, max_bytes, stop)
        else:
            with tar_archive.opened(archive) as file:
                _write(tar_archive.members(file), archive, partial, max_bytes, stop)
    return target


def _write(members: Iterable[Member], archive: Path, root: Path, max_bytes: int, stop: Stop) -> None:
    total = 0
    for count, member in enumerate(members, start=1):
        check_stop(stop)
        total += member.size
        _check_limits(archive, count, total, max_bytes)
        path = root / _relative_path(member.name, archive)
        if member.kind == "folder":
            _make_folder(path, member, archive)
        elif member.kind == "file":
            require_free_space(root, member.size)
            with _create(path, member, archive) as file:
                for block in member.blocks():
                    check_stop(stop)
                    file.write(block)
        else:
            what = "a link" if member.kind == "link" else "a device or pipe"
            raise UserError(
                f"{archive.name}: {shown(member.name)} is {what}; only files and folders are unpacked."
            )


def _check_limits(archive: Path, count: int, total: int, max_bytes: int) -> None:
    if count > MAX_MEMBERS:
        raise UserError(
            f"{archive.name} holds more than {MAX_MEMBERS:,} files and folders, the most that are unpacked."
        )
    if total > max_bytes:
        raise UserError(f"{archive.name} unpacks to more than the {size_text(max_bytes)} that are allowed.")


def _relative_path(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    leaves = path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive
    if leaves or "\0" in name:
        raise UserError(
            f"{archive.name}: {shown(name)} would leave the target folder; the archive is refused."
        )
    return path


def _make_folder(path: Path, member: Member, archive: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{archive.name}: {shown(member.name)} needs a folder where a file is; the archive is refused."
        ) from error


def _create(path: Path, member: Member, archive: Path) -> BinaryIO:
    _make_folder(path.parent, member, archive)
    try:
        return open(path, "xb")
    except (FileExistsError, IsADirectoryError) as error:
        raise UserError(
            f"{archive.name}: {shown(member.name)} appears twice; the archive is refused."
        ) from error
