"""What lands on the disk: room for it, and archives unpacked so that nothing leaves their folder."""

import bz2
import contextlib
import errno
import lzma
import os
import shutil
import stat
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, Self

from lib.cancellation import check_stop
from lib.errors import UserError
from lib.storage import zip_archive

# More than any checkpoint or data set has: a billion empty files exhaust inodes, not bytes.
MAX_MEMBERS = 100_000
BLOCK_BYTES = 1 << 20
# Python takes a tar's long names and attributes into memory whole.
MAX_HEADER_BYTES = 1 << 20
TAR_FAULTS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, RecursionError, ValueError)

Stop = threading.Event | None
Unpack = Callable[[Path, Path, int | None, Stop], None]


class NoSpaceError(UserError):
    """The disk is too full. What was downloaded so far is sound; only room is lacking."""


def size_text(count: int) -> str:
    """Return a number of bytes as people read it: `size_text(21_300_000_000)` is "21.3 GB"."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def require_free_space(
    path: Path, needed_bytes: int, *, hint: str = ", or choose a folder on another disk"
) -> None:
    """Raise NoSpaceError unless the disk that `path` is on, or will be on, has `needed_bytes` free."""
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
    """Return the UserError for a write to `path` that the disk refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            f"The disk is full: {path} could not be written. Free some space, then start again."
        )
    return UserError(f"{path} could not be written: {error.strerror or error}.")


def extract_archive(archive: Path, target: Path, *, max_bytes: int | None = None, stop: Stop = None) -> Path:
    """Unpack a zip or tar, told apart by content, into the new folder `target` and return it.

    As extract_tar, with the same refusals. Of a zip also refused are encrypted members and those that hold
    more, or less, than they announce. Sizes are checked against `max_bytes` as announced, before anything is
    written, and the written bytes never exceed what was announced.
    """
    archive, target = Path(archive), Path(target)
    kind = archive_kind(archive)
    if kind is None:
        raise UserError(
            f"{archive.name} is neither a zip nor a tar archive. Pack the files as .zip, .tar, .tar.gz, "
            ".tar.bz2 or .tar.xz."
        )
    return _extract(_unpack_zip if kind == "zip" else _unpack_tar, archive, target, max_bytes, stop)


def extract_tar(archive: Path, target: Path, *, max_bytes: int | None = None, stop: Stop = None) -> Path:
    """Unpack a tar archive, compressed or not, into the new folder `target` and return it.

    Only files, folders and links that stay inside are taken. Python's own extraction filters are not enough
    here: those of 3.11 strip leading slashes silently and can be led outside by chains of links. Modes and
    owners are dropped. `target` appears only when everything is unpacked: until then the work happens in
    `target.partial`, which is removed when anything goes wrong.

    Raises UserError when `target` exists, when the archive is no readable tar, is larger than `max_bytes`
    unpacked, or holds a member that is absolute, contains `..`, appears twice, is a device or pipe, or links
    outside; NoSpaceError when the disk is full; Stopped, between two members or blocks of one, when `stop` is
    set.
    """
    return _extract(_unpack_tar, Path(archive), Path(target), max_bytes, stop)


def archive_kind(path: Path) -> str | None:
    """Return "zip" or "tar" by what the file begins with, None for anything else."""
    if zip_archive.is_zip(path):
        return "zip"
    try:
        with _opened_tar(path):
            return "tar"
    except TAR_FAULTS:
        return None


def _extract(unpack: Unpack, archive: Path, target: Path, max_bytes: int | None, stop: Stop) -> Path:
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; {archive.name} is not unpacked over it.")
    partial = target.with_name(target.name + ".partial")
    _remove(partial)
    try:
        partial.mkdir(parents=True)
        unpack(archive, partial, max_bytes, stop)
        os.replace(partial, target)
    except OSError as error:
        raise disk_error(error, partial) from error
    finally:
        _remove(partial)
    return target


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


class _Header(tarfile.TarInfo):
    """A tar header that is refused when Python would read more into memory than names and attributes need."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if not header.isfile() and not 0 <= header.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"{header.name!r} is no file and claims {header.size:,} bytes")
        return header


@contextmanager
def _opened_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    with open(archive, "rb") as plain:
        start = plain.read(3)
        plain.seek(0)
        # tarfile would expand 10 kB at once: 45 bytes of bzip2 can be 46 MB.
        opener = {b"BZh": _Bzip2, b"\xfd7z": lzma.LZMAFile}.get(start)
        with (
            contextlib.nullcontext(plain) if opener is None else opener(plain) as file,
            tarfile.open(fileobj=file, mode="r|" if opener else "r|*", tarinfo=_Header) as members,
        ):
            yield members


class _Bzip2(bz2.BZ2File):
    """A bzip2 file whose damage is told apart from a disk's: bz2 raises OSError for both."""

    def read(self, size: int = -1) -> bytes:
        try:
            return super().read(size)
        except OSError as error:
            if error.errno is not None:
                raise
            raise tarfile.ReadError(str(error)) from error


def _unpack_tar(archive: Path, root: Path, max_bytes: int | None, stop: Stop) -> None:
    try:
        _unpack_members(archive, root, max_bytes, stop)
    except UserError:
        raise
    except TAR_FAULTS as error:
        raise UserError(f"{archive.name} is not a whole tar archive: {error}.") from error


def _unpack_members(archive: Path, root: Path, max_bytes: int | None, stop: Stop) -> None:
    links: list[tuple[tarfile.TarInfo, Path]] = []
    total = 0
    with _opened_tar(archive) as members:
        for count, member in enumerate(members, start=1):
            check_stop(stop)
            if count > MAX_MEMBERS:
                raise _too_many(archive)
            place = root / _inside(member.name, archive)
            if member.size < 0:
                raise UserError(f"{archive.name}: {member.name!r} has a negative size; refused.")
            total += member.size
            if max_bytes is not None and total > max_bytes:
                raise _too_large(archive, max_bytes)
            if member.isdir():
                _make_folder(place, member, archive)
            elif member.isreg():
                require_free_space(root, member.size)
                source = members.extractfile(member)
                assert source is not None  # tarfile returns None only for members that are no files
                _write_member(source, member, place, archive, stop)
            elif member.issym() or member.islnk():
                links.append((member, place))
            else:
                raise _special(member.name, archive)
    _make_links(links, root, archive)


def _unpack_zip(archive: Path, root: Path, max_bytes: int | None, stop: Stop) -> None:
    links: list[tuple[tarfile.TarInfo, Path]] = []
    with zip_archive.opened(archive) as members:
        listed = members.infolist()
        if len(listed) > MAX_MEMBERS:
            raise _too_many(archive)
        total = sum(entry.file_size for entry in listed)
        if max_bytes is not None and total > max_bytes:
            raise _too_large(archive, max_bytes)
        require_free_space(root, total)
        for entry in listed:
            check_stop(stop)
            member = zip_archive.as_tar_member(entry, archive)
            place = root / _inside(member.name, archive)
            if member.isdir():
                _make_folder(place, member, archive)
            elif member.isreg():
                with _created(place, member, archive) as file:
                    zip_archive.copy(members, entry, file, archive, stop=stop)
            elif member.issym():
                member.linkname = zip_archive.link_target(members, entry, archive)
                links.append((member, place))
            else:
                raise _special(member.name, archive)
    _make_links(links, root, archive)


def _too_many(archive: Path) -> UserError:
    return UserError(f"{archive.name} holds more than {MAX_MEMBERS} members; it is refused.")


def _too_large(archive: Path, max_bytes: int) -> UserError:
    return UserError(f"{archive.name} unpacks to more than the {size_text(max_bytes)} that are allowed.")


def _special(name: str, archive: Path) -> UserError:
    return UserError(f"{archive.name}: {name!r} is a device or pipe; the archive is refused.")


def _inside(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    leaves = path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive
    if leaves or "\0" in name:
        raise UserError(f"{archive.name}: {name!r} would leave the target folder; the archive is refused.")
    return path


def _make_folder(place: Path, member: tarfile.TarInfo, archive: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{archive.name}: {member.name!r} needs a folder where a file is; refused."
        ) from error


def _created(place: Path, member: tarfile.TarInfo, archive: Path) -> BinaryIO:
    _make_folder(place.parent, member, archive)
    try:
        return open(place, "xb")
    except (FileExistsError, IsADirectoryError) as error:
        raise UserError(f"{archive.name}: {member.name!r} appears twice; the archive is refused.") from error


def _write_member(source: BinaryIO, member: tarfile.TarInfo, place: Path, archive: Path, stop: Stop) -> None:
    with _created(place, member, archive) as file:
        while block := source.read(BLOCK_BYTES):
            check_stop(stop)
            file.write(block)
        written = file.tell()
    if written != member.size:
        raise UserError(f"{archive.name} ends inside {member.name!r}; the archive is not whole.")


def _make_links(links: list[tuple[tarfile.TarInfo, Path]], root: Path, archive: Path) -> None:
    # Links come last: as long as none exists, no file can be written through one.
    for member, place in links:
        _make_link(member, place, root, archive)
    _check_links([place for member, place in links if member.issym()], root, archive)


def _make_link(member: tarfile.TarInfo, place: Path, root: Path, archive: Path) -> None:
    _make_folder(place.parent, member, archive)
    if not place.parent.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{archive.name}: {member.name!r} lies behind a link; the archive is refused.")
    try:
        if member.issym():
            if PurePosixPath(member.linkname).is_absolute():
                raise UserError(f"{archive.name}: {member.name!r} links to an absolute path; refused.")
            place.symlink_to(member.linkname)
        else:
            original = root / _inside(member.linkname, archive)
            if original.resolve() != root.resolve() / original.relative_to(root):
                raise UserError(f"{archive.name}: {member.name!r} links through another link; refused.")
            if not stat.S_ISREG(original.lstat().st_mode):
                raise UserError(f"{archive.name}: {member.name!r} is a hard link to no file; refused.")
            os.link(original, place, follow_symlinks=False)
    except FileExistsError as error:
        raise UserError(f"{archive.name}: {member.name!r} appears twice; the archive is refused.") from error
    except FileNotFoundError as error:
        raise UserError(
            f"{archive.name}: {member.name!r} links to nothing in the archive; refused."
        ) from error


def _check_links(places: list[Path], root: Path, archive: Path) -> None:
    # Where a link leads depends on the other links on its way, so it is asked of the file system, strictly:
    # a link that dangles, loops or grows too long raises instead of being half-resolved.
    top = root.resolve()
    for place in places:
        name = place.relative_to(root)
        try:
            goal = place.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{archive.name}: link '{name}' leads nowhere; the archive is refused."
            ) from error
        if not goal.is_relative_to(top):
            raise UserError(
                f"{archive.name}: link '{name}' leaves the target folder; the archive is refused."
            )
