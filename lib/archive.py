"""What lands on the disk: room for it, and tar archives unpacked so that nothing leaves their folder."""

import errno
import lzma
import os
import shutil
import stat
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from lib.errors import UserError

# More than any checkpoint or data set has: a billion empty files exhaust inodes, not bytes.
MAX_MEMBERS = 100_000
BLOCK_BYTES = 1 << 20


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


def extract_tar(archive: Path, target: Path, *, max_bytes: int | None = None) -> Path:
    """Unpack a tar archive, compressed or not, into the new folder `target` and return it.

    Only files, folders and links that stay inside are taken. Python's own extraction filters are not enough
    here: those of 3.11 strip leading slashes silently and can be led outside by chains of links. Modes and
    owners are dropped. `target` appears only when everything is unpacked: until then the work happens in
    `target.partial`, which is removed when anything goes wrong.

    Raises UserError when `target` exists, when the archive is no readable tar, is larger than `max_bytes`
    unpacked, or holds a member that is absolute, contains `..`, appears twice, is a device or pipe, or links
    outside; NoSpaceError when the disk is full.
    """
    archive, target = Path(archive), Path(target)
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; {archive.name} is not unpacked over it.")
    partial = target.with_name(target.name + ".partial")
    _remove(partial)
    try:
        partial.mkdir(parents=True)
        _unpack(archive, partial, max_bytes)
        os.replace(partial, target)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{archive.name} is not a whole tar archive: {error}.") from error
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


def _unpack(archive: Path, root: Path, max_bytes: int | None) -> None:
    links: list[tuple[tarfile.TarInfo, Path]] = []
    total = 0
    with tarfile.open(archive, "r|*") as members:
        for count, member in enumerate(members, start=1):
            if count > MAX_MEMBERS:
                raise UserError(f"{archive.name} holds more than {MAX_MEMBERS} members; it is refused.")
            place = root / _inside(member.name, archive)
            total += member.size
            if max_bytes is not None and total > max_bytes:
                raise UserError(
                    f"{archive.name} unpacks to more than the {size_text(max_bytes)} that are allowed."
                )
            if member.isdir():
                _make_folder(place, member, archive)
            elif member.isreg():
                _make_folder(place.parent, member, archive)
                _write_member(members, member, place, archive)
            elif member.issym() or member.islnk():
                links.append((member, place))
            else:
                raise UserError(
                    f"{archive.name}: {member.name!r} is a device or pipe; the archive is refused."
                )
    # Links come last: as long as none exists, no file can be written through one.
    for member, place in links:
        _make_link(member, place, root, archive)
    _check_links([place for member, place in links if member.issym()], root, archive)


def _inside(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(f"{archive.name}: {name!r} would leave the target folder; the archive is refused.")
    return path


def _make_folder(place: Path, member: tarfile.TarInfo, archive: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{archive.name}: {member.name!r} needs a folder where a file is; refused."
        ) from error


def _write_member(members: tarfile.TarFile, member: tarfile.TarInfo, place: Path, archive: Path) -> None:
    source = members.extractfile(member)
    assert source is not None  # tarfile returns None only for members that are no files
    try:
        with open(place, "xb") as file:
            shutil.copyfileobj(source, file, BLOCK_BYTES)
            written = file.tell()
    except (FileExistsError, IsADirectoryError) as error:
        raise UserError(f"{archive.name}: {member.name!r} appears twice; the archive is refused.") from error
    if written != member.size:
        raise UserError(f"{archive.name} ends inside {member.name!r}; the archive is not whole.")


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
