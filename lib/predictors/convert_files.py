"""What a person hands over (an upload, an address, a path) -> a file or folder on this disk while it is used.

An address is fetched by the service itself: what Cog fetches for an input may have 2 GiB, and a 5B
checkpoint has ten times that. What came before a request was cancelled or the line broke stays in the cache
folder, and the next request for it goes on from there; a whole file goes when it has been used.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lib.cancellation import Stopped
from lib.convert.locating import is_torch_zip
from lib.errors import UserError
from lib.lora.source import HUB_HOSTS
from lib.network.download import fetch
from lib.network.urls import local_sources_allowed, request_rules
from lib.predictors.input_files import check_file
from lib.progress import Report
from lib.storage import zip_archive
from lib.storage.archive import Stop, archive_kind, extract_archive
from lib.storage.disk import disk_error
from lib.storage.lock import lock
from lib.weights.cache import cache_folder

MAX_BYTES = 100 * 10**9
"""Of a file, and of what an archive holds. A 5B model with its text encoder has 42 GB in float32."""
FETCH_SECONDS = 3 * 3600.0
"""A fetch holds the server's only slot: 21 GB at 2 MB a second arrive in it."""
KEPT = 3
"""Unfinished downloads that stay, the newest."""
FOLDER = "checkpoints"
COGS_PREFIX = re.compile(r"tmp[a-z0-9_]{8}")
"""What Cog puts before the name of an upload."""
LONGEST_NAME = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """One checkpoint as a request names it: `upload` is the input called `slot`, `address` is `slot`_url."""

    slot: str
    upload: Path | None = None
    address: str = ""

    def __post_init__(self) -> None:
        if self.upload is not None and self.address.strip():
            raise UserError(f"Give {self.slot} or {self.slot}_url, not both.")

    def __bool__(self) -> bool:
        return self.upload is not None or bool(self.address.strip())


@contextmanager
def brought(given: Given, *, work: Path, report: Report = print, stop: Stop = None) -> Iterator[Path | None]:
    """The checkpoint on this disk; None when none is given. Archives are unpacked into `work`.

    An address has to be public and https; a path of this machine counts only where local sources are
    allowed. Raises UserError for those that are not, FetchError, NoSpaceError, and Stopped.
    """
    if not given:
        yield None
        return
    address, place = given.address.strip(), work / given.slot
    if given.upload is not None:
        path = _named(_readable(check_file(given.upload)), given.slot, place)
        yield _unpacked(path, place, stop)
    elif "://" in address and not address.startswith("file://"):
        with _fetched(address, slot=given.slot, report=report, stop=stop) as path:
            yield _unpacked(path, place, stop)
    else:
        yield _unpacked(_local(address, given.slot), place, stop)


def _named(path: Path, slot: str, place: Path) -> Path:
    """An upload under the name that its sender knows, which messages use; others as they are."""
    brought_by_cog = COGS_PREFIX.match(path.name) and path.parent == Path(tempfile.gettempdir())
    if not brought_by_cog or path.is_dir():
        return path
    name = path.name[len("tmp12345678") :]
    if not name or Path(name).stem == "file":  # of a data URI, which has no name
        name = f"{slot}{Path(name).suffix}"
    place.mkdir(parents=True, exist_ok=True)
    link = place / name[-LONGEST_NAME:]
    link.symlink_to(path.resolve())
    return link


def _local(address: str, slot: str) -> Path:
    path = Path(unquote(address.removeprefix("file://")) if address.startswith("file://") else address)
    if not local_sources_allowed():
        raise UserError(
            f"{slot}_url={address[:200]!r} is no address; give one that begins with https://, or upload "
            "the file."
        )
    path = path.expanduser()
    if not path.is_absolute():
        raise UserError(
            f"{slot}_url={address[:200]!r} is not the whole path, and the server stands in a folder of "
            "its own."
        )
    return _readable(path)


def _readable(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: this process may not.")
    return path


def _unpacked(path: Path, place: Path, stop: Stop) -> Path:
    """The content of an archive, in a folder that is called as it is; anything else as it is."""
    if path.is_dir() or not _is_archive(path):
        return path
    return extract_archive(path, place / "unpacked" / path.name, max_bytes=MAX_BYTES, stop=stop)


def _is_archive(path: Path) -> bool:
    if zip_archive.is_zip(path):
        return not is_torch_zip(path)
    return archive_kind(path) == "tar"


@contextmanager
def _fetched(address: str, *, slot: str, report: Report, stop: Stop) -> Iterator[Path]:
    url = _direct(address)
    folder = cache_folder() / FOLDER
    entry = folder / hashlib.sha256(url.encode()).hexdigest()[:32]
    name = _name_in(url) or f"{slot}.download"
    rules = request_rules(stop=stop, seconds=FETCH_SECONDS)
    rules.check_url(url)  # before anything is made for it
    with ExitStack() as held:
        try:
            held.enter_context(lock(entry, report, stop=stop))
            _trim(folder, entry)
        except OSError as error:
            raise disk_error(error, folder) from error
        try:
            path = fetch(url, entry / name, max_bytes=MAX_BYTES, rules=rules, report=report)
        finally:
            _remove_if_empty(entry)
        try:
            yield path
        except Stopped:
            raise  # the same request goes on with it
        except Exception:
            shutil.rmtree(entry, ignore_errors=True)  # what was wrong with it may be mended at the host
            raise
        shutil.rmtree(entry, ignore_errors=True)


def _direct(address: str) -> str:
    """The file of a page on the Hub that shows it; other addresses as they are, without what follows a #."""
    url = address.partition("#")[0]
    host = urlsplit(url).hostname if "[" not in url else None
    return url.replace("/blob/", "/resolve/", 1) if host in HUB_HOSTS else url


def _name_in(url: str) -> str:
    """The file's name at the end of an address, fit for a folder of ours."""
    last = unquote(urlsplit(url).path.rpartition("/")[2])
    return re.sub(r"[^\w.+-]", "_", last).lstrip(".")[-LONGEST_NAME:]


def _trim(folder: Path, mine: Path) -> None:
    """Remove the oldest unfinished downloads that nobody is at."""
    others = [path for path in folder.iterdir() if path.is_dir() and path != mine]
    others.sort(key=lambda path: path.stat().st_mtime)
    for path in others[: max(0, len(others) - KEPT + 1)]:
        with lock(path, lambda line: None, wait=False) as nobodys:
            if nobodys:
                shutil.rmtree(path, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(os.scandir(folder)):
        folder.rmdir()
