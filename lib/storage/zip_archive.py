"""Zip archives: a member's true name and kind, and exactly the bytes it announces."""

import bz2
import io
import lzma
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy as copy_of
from pathlib import Path
from typing import BinaryIO

from lib.cancellation import check_stop
from lib.errors import UserError

STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # with members, and empty
MAX_CONTENTS_BYTES = 32 << 20
"""Of the table of contents, which Python reads whole: 100,000 members with long names."""
MAX_LINK_BYTES = 4096
BLOCK_BYTES = 1 << 20
LZMA_BLOCK_BYTES = 4096
"""zipfile expands what it read of LZMA at once, up to 7000 times as much."""
UTF_8_NAME, ENCRYPTED = 0x800, 0x1
FAULTS = (
    zipfile.BadZipFile,
    NotImplementedError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ValueError,
)
"""What zipfile raises for damaged files."""


def is_zip(path: Path) -> bool:
    """Whether the file begins as a zip does. (It may end as one and be a tar whose last member is a zip.)"""
    with open(path, "rb") as file:
        return file.read(4) in STARTS


@contextmanager
def opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, open. Raises UserError when its table of contents is damaged or absurdly large."""
    with _Reader(archive) as file:
        try:
            members = zipfile.ZipFile(file)
        except FAULTS as error:
            raise UserError(f"{archive.name} is not a whole zip archive: {error}.") from error
        with members:
            yield members


class _Reader(io.FileIO):
    """A file that is never read into memory as one huge piece, whatever the archive claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_CONTENTS_BYTES:
            raise zipfile.BadZipFile(f"its table of contents claims {size:,} bytes")
        return super().read(-1 if size is None else size)


def as_tar_member(entry: zipfile.ZipInfo, archive: Path) -> tarfile.TarInfo:
    """Name, size and kind of a member, as a tar would say them. Raises UserError for an encrypted one."""
    member = tarfile.TarInfo(_name(entry))
    member.size = entry.file_size
    if entry.flag_bits & ENCRYPTED:
        raise UserError(f"{archive.name}: {member.name!r} is encrypted. Pack the files without a password.")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if member.name.endswith("/") or kind == stat.S_IFDIR:
        member.type = tarfile.DIRTYPE
    elif kind == stat.S_IFLNK:
        member.type = tarfile.SYMTYPE
    elif kind not in (0, stat.S_IFREG):
        member.type = tarfile.CHRTYPE
    return member


def link_target(members: zipfile.ZipFile, entry: zipfile.ZipInfo, archive: Path) -> str:
    """Where a symbolic link leads. Raises UserError when that is no path."""
    if entry.file_size > MAX_LINK_BYTES:
        raise UserError(
            f"{archive.name}: link {_name(entry)!r} has {entry.file_size:,} bytes; the archive is refused."
        )
    target = io.BytesIO()
    copy(members, entry, target, archive)
    if b"\0" in target.getvalue():
        raise UserError(f"{archive.name}: link {_name(entry)!r} holds no path; the archive is refused.")
    return os.fsdecode(target.getvalue())


def copy(
    members: zipfile.ZipFile,
    entry: zipfile.ZipInfo,
    target: BinaryIO,
    archive: Path,
    *,
    stop: threading.Event | None = None,
) -> None:
    """Write a member's bytes to `target`: as many as it announces, else UserError; Stopped between blocks."""
    name, announced = _name(entry), entry.file_size
    written = checksum = 0
    try:
        with _opened_entry(members, entry) as source:
            while block := _read(
                source, LZMA_BLOCK_BYTES if entry.compress_type == zipfile.ZIP_LZMA else BLOCK_BYTES
            ):
                check_stop(stop)
                written += len(block)
                if written > announced:
                    break
                checksum = zlib.crc32(block, checksum)
                target.write(block)
    except FAULTS as error:
        raise UserError(f"{archive.name}: {name!r} cannot be unpacked: {error}.") from error
    if written > announced:
        raise UserError(
            f"{archive.name}: {name!r} holds more than the {announced:,} bytes it announces; it is refused."
        )
    if written < announced:
        raise UserError(f"{archive.name}: {name!r} ends early; the archive is not whole.")
    if checksum != entry.CRC:
        raise UserError(f"{archive.name}: {name!r} is damaged: its checksum is not the one announced.")


def _opened_entry(members: zipfile.ZipFile, entry: zipfile.ZipInfo) -> BinaryIO:
    """A member's bytes, all of them: zipfile would stop at the announced size in silence."""
    asked = copy_of(entry)
    asked.CRC = None  # of the announced bytes, which the caller checks
    if entry.compress_type == zipfile.ZIP_BZIP2:
        # zipfile would expand whatever it read at once, and 45 bytes of bzip2 can be 46 MB.
        asked.compress_type, asked.file_size = zipfile.ZIP_STORED, entry.compress_size
        return bz2.open(members.open(asked))
    asked.file_size += 1
    return members.open(asked)


def _read(source: BinaryIO, size: int) -> bytes:
    try:
        return source.read(size)
    except OSError as error:
        if error.errno is not None:
            raise
        raise EOFError(error) from error  # so bz2 says that data are damaged


def _name(entry: zipfile.ZipInfo) -> str:
    name = entry.orig_filename
    if not entry.flag_bits & UTF_8_NAME:
        # Without the flag a name is in the oldest code page; macOS omits it and writes UTF-8 all the same.
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            name = entry.orig_filename
    return name.replace("\\", "/")  # as some Windows programs write it
