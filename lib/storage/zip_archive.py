"""Read zip archives: each member's true name and kind, and exactly the bytes it announces."""

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

from lib.errors import UserError, shown
from lib.storage.member import BLOCK_BYTES, Kind, Member
from lib.storage.zip_names import member_names

STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # with members, and empty
MAX_CONTENTS_BYTES = 32 << 20
"""Largest table of contents, which Python reads into memory at once: 100,000 members with long names."""
ENCRYPTED = 0x1
METHODS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA"}
FAULTS = (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, struct.error, ValueError)
"""What zipfile raises for damaged files."""


def is_zip(path: Path) -> bool:
    """Return whether the file begins as a zip does. (A tar whose last member is a zip ends like one.)"""
    with open(path, "rb") as file:
        return file.read(4) in STARTS


@contextmanager
def opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive. Raises UserError when its table of contents is damaged or absurdly large."""
    with _Reader(archive) as file:
        try:
            members = zipfile.ZipFile(file)
        except FAULTS as error:
            raise UserError(f"{archive.name} is not a complete zip archive: {error}.") from error
        with members:
            yield members


def members(file: zipfile.ZipFile, archive: Path) -> list[Member]:
    """Return all members. Raises UserError for encrypted ones and for compression other than deflate."""
    entries = file.infolist()
    names = member_names(entries)
    return [_member(file, entry, name, archive) for entry, name in zip(entries, names, strict=True)]


def _member(file: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, archive: Path) -> Member:
    if entry.flag_bits & ENCRYPTED:
        raise UserError(f"{archive.name}: {shown(name)} is encrypted. Pack the files without a password.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = METHODS.get(entry.compress_type, f"method {entry.compress_type}")
        raise UserError(
            f"{archive.name}: {shown(name)} is compressed with {method}. Pack the files with deflate, the "
            "usual method of zip, or without compression."
        )
    return Member(
        name=name,
        kind=_kind(name, entry),
        size=entry.file_size,
        blocks=lambda: _blocks(file, entry, name, archive),
    )


def _kind(name: str, entry: zipfile.ZipInfo) -> Kind:
    mode = stat.S_IFMT(entry.external_attr >> 16)
    if name.endswith("/") or mode == stat.S_IFDIR:
        return "folder"
    if mode == stat.S_IFLNK:
        return "link"
    return "file" if mode in (0, stat.S_IFREG) else "special"


def _blocks(file: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, archive: Path) -> Iterator[bytes]:
    announced, count, checksum = entry.file_size, 0, 0
    # zipfile would silently stop at the announced size: one byte more shows whether there is more.
    asked = copy(entry)
    asked.file_size += 1
    asked.CRC = None  # pyright: ignore[reportAttributeAccessIssue] # it is of the announced bytes; checked below
    try:
        with file.open(asked) as source:
            while block := source.read(BLOCK_BYTES):
                count += len(block)
                if count > announced:
                    break
                checksum = zlib.crc32(block, checksum)
                yield block
    except FAULTS as error:
        raise UserError(f"{archive.name}: {shown(name)} cannot be unpacked: {error}.") from error
    if count > announced:
        raise UserError(
            f"{archive.name}: {shown(name)} holds more than the {announced:,} bytes it announces; it is "
            "refused."
        )
    if count < announced:
        raise UserError(f"{archive.name}: {shown(name)} ends early; the archive is incomplete.")
    if checksum != entry.CRC:
        raise UserError(f"{archive.name}: {shown(name)} is damaged: its checksum is not the one announced.")


class _Reader(io.FileIO):
    """A file that is never read into memory as one huge piece, whatever the archive claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_CONTENTS_BYTES:
            raise zipfile.BadZipFile(f"its table of contents claims {size:,} bytes")
        return super().read(-1 if size is None else size) or b""
