"""Pack a folder into a tar without user names and times of this machine."""

import tarfile
from pathlib import Path
from typing import BinaryIO

from lib.cancellation import check_stop
from lib.storage.archive import Stop
from lib.storage.disk import replacing, require_free_space

DATE = 315_532_800
"""1 January 1980, as in zips without a date: the same content gives the same bytes."""


def pack(folder: Path, target: Path, *, consume: bool = False, stop: Stop = None) -> Path:
    """Write the folder's content to the uncompressed tar `target` (weights do not compress) and return it.

    `target` appears only when it is complete. With `consume` each file is deleted as soon as it is in the
    tar, so that the disk need not hold all of them twice. Raises UserError when it cannot be written,
    NoSpaceError when the disk is too full, and Stopped.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    with replacing(target) as partial:
        require_free_space(partial.parent, max(sizes, default=0) if consume else sum(sizes))
        with tarfile.open(partial, "w", dereference=True) as archive:
            for path in sorted(folder.rglob("*")):
                member = archive.gettarinfo(path, arcname=str(path.relative_to(folder)))
                _forget_machine(member)
                if not member.isfile():
                    archive.addfile(member)
                    continue
                with path.open("rb") as file:
                    archive.addfile(member, _Stoppable(file, stop))
                if consume:
                    path.unlink()
    return target


def _forget_machine(member: tarfile.TarInfo) -> None:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = DATE
    member.mode = 0o755 if member.isdir() else 0o644


class _Stoppable:
    """A file whose `read` raises Stopped once `stop` is set."""

    def __init__(self, file: BinaryIO, stop: Stop) -> None:
        self._file, self._stop = file, stop

    def read(self, size: int = -1) -> bytes:
        check_stop(self._stop)
        return self._file.read(size)
