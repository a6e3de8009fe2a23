"""Opening a data set: a folder, an archive to unpack, or a data set repository on the Hub."""

import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from lib.datasets.files import FORMS, VIDEO_ENDINGS, counted, is_ignored
from lib.datasets.own_captions import TEXTS as OPEN_CAPTIONS
from lib.errors import UserError, cut, shown
from lib.network import hub
from lib.network.download import fetch_repository, sha256_of
from lib.network.urls import request_rules
from lib.progress import Report, silent
from lib.storage.archive import archive_kind, extract_archive
from lib.storage.disk import disk_error, size_text
from lib.storage.lock import lock


def open_data(
    source: Path, work: Path, *, max_bytes: int | None = None, stop: threading.Event | None = None
) -> Path:
    """Return the folder of a data set: `source` itself, or its unpacked content in a folder under `work`.

    An archive is a zip or tar, whatever its name. It is unpacked completely or not at all, and once for the
    same content. Its content may have up to `max_bytes`. Raises UserError naming the archive and the
    member at fault, NoSpaceError when the disk is full, and Stopped.
    """
    if source.is_dir():
        return source
    if not source.is_file():
        raise UserError(f"{source} does not exist. Give a folder, or a zip or tar of clips with captions.")
    if archive_kind(source) is None:
        raise UserError(
            f"{source.name} is neither a folder nor a zip or tar archive (.zip, .tar, .tar.gz, .tar.bz2, "
            f".tar.xz). {FORMS}"
        )
    target = Path(work) / f"data-{sha256_of(source, stop=stop)[:16]}" / source.name
    with lock(target, silent, stop=stop):  # the processes of one run open the same data
        return target if target.exists() else extract_archive(source, target, max_bytes=max_bytes, stop=stop)


def fetch_hub_dataset(
    name: str, kept: Path, report: Report = print, *, stop: threading.Event | None = None
) -> Path:
    """Download the data set repository "owner/name" or "owner/name@revision" to a folder in `kept`.

    Only videos, by their endings, and files that may hold captions are downloaded; the report says how many
    others there are. A later call resumes an interrupted one, and
    asks the Hub whether the revision has moved. Raises UserError when there is no such data set, when it has
    no video files, and when a download fails; Stopped.
    """
    repository, at, revision = name.strip().partition("@")
    if not hub.REPOSITORY.fullmatch(repository) or ".." in repository or (at and not revision):
        inside = re.search(r"datasets/([^/@?#]+/[^/@?#]+)", name)
        meant = f" Perhaps {cut(inside[1])}?" if inside and hub.REPOSITORY.fullmatch(inside[1]) else ""
        raise UserError(
            f"dataset_name={shown(name)} is not a data set on the Hugging Face Hub: give owner/name, or "
            f"owner/name@revision.{meant}"
        )
    headers = hub.request_headers(repository)
    rules = request_rules(stop=stop, trusted=hub.endpoint(), seconds=math.inf)
    snapshot = hub.listing(repository, revision or "main", headers=headers, kind="datasets", rules=rules)
    files = [file for file in snapshot.files if _is_wanted(PurePosixPath(file.path))]
    _check_files(repository, [file.path for file in snapshot.files], [file.path for file in files])
    # Sanitized, as the server's answer becomes part of a path.
    commit = re.sub(r"[^0-9A-Za-z]", "", snapshot.commit)[:16]
    final = kept / f"{repository.replace('/', '--')}@{commit}"
    try:
        with lock(final, report, stop=stop):
            if not final.exists():
                total = size_text(sum(file.size or 0 for file in files))
                report(f"{repository}: downloading {len(files)} files, {total}")
                if others := _others(snapshot.files, files):
                    report(f"{repository}: not downloaded: {others}")
                # Silent: hundreds of small files would flood the log.
                fetch_repository(files, final, headers=headers, report=silent, rules=rules)
    except OSError as error:
        raise disk_error(error, final) from error
    return final


def _is_wanted(path: PurePosixPath) -> bool:
    if any(is_ignored(part) for part in path.parts):
        return False
    return path.suffix.lower() in VIDEO_ENDINGS | OPEN_CAPTIONS


def _others(listed: Sequence[hub.HubFile], wanted: Sequence[hub.HubFile]) -> str:
    """Return the files that are not downloaded, counted by their endings."""
    paths = [PurePosixPath(file.path) for file in listed if file not in wanted]
    return counted(path for path in paths if not any(is_ignored(part) for part in path.parts))


def _check_files(repository: str, listed: list[str], wanted: list[str]) -> None:
    paths = [PurePosixPath(path) for path in listed]
    if any(path.is_absolute() or ".." in path.parts or "\0" in str(path) for path in paths):
        raise UserError(f"{repository} lists a file outside itself; it is refused.")
    if not any(PurePosixPath(path).suffix.lower() in VIDEO_ENDINGS for path in wanted):
        packed = sorted({path.suffix.lower() for path in paths} & {".parquet", ".arrow", ".zip", ".tar"})
        kept = (
            f": it keeps its data in {', '.join(packed)} files, which are not read from the Hub"
            if packed
            else ""
        )
        raise UserError(f"{repository} on the Hugging Face Hub has no video files{kept}. {FORMS}")
