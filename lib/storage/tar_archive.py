"""Read tar archives, plain or compressed with gzip, bzip2 or xz, as a stream of members."""

import bz2
import contextlib
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self, cast

from lib.errors import UserError, shown
from lib.storage.member import BLOCK_BYTES, Kind, Member

# Python reads a tar's long names and attributes into memory at once.
MAX_HEADER_BYTES = 1 << 20
FAULTS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, RecursionError, ValueError)


def is_tar(path: Path) -> bool:
    """Return whether the file begins as a tar archive does, compressed or not."""
    try:
        with _open(path):
            return True
    except FAULTS:
        return False


@contextmanager
def opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open the archive. Raises UserError when it is damaged, also while its members are read."""
    try:
        with _open(archive) as file:
            yield file
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(f"{archive.name} is not a complete tar archive: {error}.") from error


def members(file: tarfile.TarFile) -> Iterator[Member]:
    """Yield the members in the order of the archive; each is read before the next is asked for."""
    for entry in file:
        if entry.size < 0:
            raise tarfile.ReadError(f"{shown(entry.name)} has a negative size")
        yield Member(
            name=entry.name,
            kind=_kind(entry),
            size=entry.size,
            blocks=lambda entry=entry: _blocks(file, entry),
        )


def _kind(entry: tarfile.TarInfo) -> Kind:
    if entry.isdir():
        return "folder"
    if entry.isreg():
        return "file"
    return "link" if entry.issym() or entry.islnk() else "special"


def _blocks(file: tarfile.TarFile, entry: tarfile.TarInfo) -> Iterator[bytes]:
    source = file.extractfile(entry)
    assert source is not None  # tarfile returns None only for members that are not files
    count = 0
    while block := source.read(BLOCK_BYTES):
        count += len(block)
        yield block
    if count != entry.size:
        raise tarfile.ReadError(f"it ends inside {shown(entry.name)}")


@contextmanager
def _open(archive: Path) -> Iterator[tarfile.TarFile]:
    with open(archive, "rb") as plain:
        start = plain.read(3)
        plain.seek(0)
        # tarfile would expand 10 kB at once: 45 bytes of bzip2 can be 46 MB.
        opener = {b"BZh": _Bzip2, b"\xfd7z": lzma.LZMAFile}.get(start)
        with contextlib.nullcontext(plain) if opener is None else opener(plain) as content:
            stream = cast("IO[bytes]", content)
            with (
                tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header)
                if opener is None
                else tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header)
            ) as file:
                yield file


class _Header(tarfile.TarInfo):
    """A tar header, refused when Python would read more into memory than names and attributes need."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if not header.isfile() and not 0 <= header.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"{shown(header.name)} is not a file but claims {header.size:,} bytes")
        return header


class _Bzip2(bz2.BZ2File):
    """A bzip2 file that raises ReadError for damaged data; bz2 raises OSError, like a failing disk."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(-1 if size is None else size)
        except OSError as error:
            if error.errno is not None:
                raise
            raise tarfile.ReadError(str(error)) from error
