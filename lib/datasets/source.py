"""Where a data set comes from: a folder, an archive that is unpacked, a data set repository of the Hub."""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from lib.datasets.listings import FORMS, TABLES, VIDEO_ENDINGS, is_ignored
from lib.errors import UserError
from lib.network import hub
from lib.network.download import fetch, sha256_of
from lib.network.http import until
from lib.storage.archive import archive_kind, extract_archive
from lib.storage.disk import disk_error, require_free_space, size_text
from lib.storage.lock import lock

UNPACKED_PER_ARCHIVE_BYTE, UNSUSPICIOUS_BYTES = 100, 1 << 30
"""Video does not compress: what unpacks to over a GiB and over a hundred times its size is a bomb."""


def open_data(
    source: Path, work: Path, *, max_bytes: int | None = None, stop: threading.Event | None = None
) -> Path:
    """Return the folder of a data set: `source` itself, or a folder under `work` with what it packs.

    An archive is a zip or tar, whatever its name; it is unpacked whole or not at all, and once for the same
    content. It may hold `max_bytes`, and no more than the larger of 1 GiB and a hundred times its own size.
    Raises UserError naming the archive and the member at fault, as extract_archive does, and
    NoSpaceError when the disk has no room; Stopped soon after `stop` was set.
    """
    source = Path(source)
    if source.is_dir():
        return source
    if not source.is_file():
        raise UserError(f"{source} does not exist. Give a folder, or a zip or tar of clips with captions.")
    if archive_kind(source) is None:
        raise UserError(
            f"{source.name} is neither a folder nor a zip or tar archive (.zip, .tar, .tar.gz, .tar.bz2, "
            f".tar.xz). {FORMS}"
        )
    limit = max(UNSUSPICIOUS_BYTES, UNPACKED_PER_ARCHIVE_BYTE * source.stat().st_size)
    if max_bytes is not None:
        limit = min(limit, max_bytes)
    target = Path(work) / f"data-{sha256_of(source, stop=stop)[:16]}" / source.name
    with lock(target, _nobody, stop=stop):  # several processes of one run open the same data
        return target if target.exists() else extract_archive(source, target, max_bytes=limit, stop=stop)


def fetch_hub_dataset(
    name: str, kept: Path, report: Callable[[str], None] = print, *, stop: threading.Event | None = None
) -> Path:
    """Download a data set repository, "owner/name" or "owner/name@revision", into `kept`; its folder there.

    Videos, .txt files and metadata tables come, nothing else; a later call continues where an earlier one
    stopped, and asks the Hub whether the revision has moved. Raises UserError when there is no such data set,
    when it has no video files, and when a download fails; Stopped soon after `stop` was set.
    """
    repository, at, revision = name.strip().partition("@")
    if not hub.REPOSITORY.fullmatch(repository) or ".." in repository or (at and not revision):
        inside = re.search(r"datasets/([^/@?#]+/[^/@?#]+)", name)
        meant = f" Perhaps {inside[1]}?" if inside and hub.REPOSITORY.fullmatch(inside[1]) else ""
        raise UserError(
            f"dataset_name={name!r} is no data set on the Hugging Face Hub: give owner/name, or "
            f"owner/name@revision.{meant}"
        )
    snapshot = hub.listing(repository, revision or "main", kind="datasets", rules=until(stop))
    files = [file for file in snapshot.files if _is_wanted(PurePosixPath(file.path))]
    _check_files(repository, [file.path for file in snapshot.files], [file.path for file in files])
    # The Hub's word, of which a path is made here.
    commit = re.sub(r"[^0-9A-Za-z]", "", snapshot.commit)[:16]
    final = Path(kept) / f"{repository.replace('/', '--')}@{commit}"
    try:
        with lock(final, report, stop=stop):
            if not final.exists():
                _fetch_files(repository, files, final, report, stop)
    except OSError as error:
        raise disk_error(error, final) from error
    return final


def _fetch_files(
    repository: str,
    files: list[hub.HubFile],
    final: Path,
    report: Callable[[str], None],
    stop: threading.Event | None,
) -> None:
    partial = final.with_name(final.name + ".partial")
    whole = sum(file.size or 0 for file in files)
    # What is begun is as long as the whole from the start, but takes only what has come.
    there = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    require_free_space(partial, whole - there, hint=", or set COGVIDEOX_CACHE to a folder on another disk")
    report(f"{repository}: downloading {len(files)} files, {size_text(whole)}")
    headers = hub.headers()
    for file in files:
        fetch(
            file.url,
            partial / file.path,
            size=file.size,
            sha256=file.sha256,
            headers=headers,
            report=_nobody,
            stop=stop,
        )
    os.replace(partial, final)


def _nobody(line: str) -> None:
    """Reports to nobody: one line for each of hundreds of small files is noise."""


def _is_wanted(path: PurePosixPath) -> bool:
    if any(is_ignored(part) for part in path.parts):
        return False
    return path.suffix.lower() in VIDEO_ENDINGS | {".txt"} or path.name.lower() in TABLES


def _check_files(repository: str, listed: list[str], wanted: list[str]) -> None:
    places = [PurePosixPath(path) for path in listed]
    if any(place.is_absolute() or ".." in place.parts or "\0" in str(place) for place in places):
        raise UserError(f"{repository} lists a file outside itself; it is refused.")
    if not any(PurePosixPath(path).suffix.lower() in VIDEO_ENDINGS for path in wanted):
        packed = sorted({place.suffix.lower() for place in places} & {".parquet", ".arrow", ".zip", ".tar"})
        kept = (
            f": it keeps its data in {', '.join(packed)} files, which are not read from the Hub"
            if packed
            else ""
        )
        raise UserError(f"{repository} on the Hugging Face Hub has no video files{kept}. {FORMS}")
