"""Resolve a checkpoint input (an upload, an address or a path) to a file or folder on this disk.

The service downloads addresses itself: Cog downloads inputs of up to 2 GiB, and a 5B checkpoint has ten times
that. An interrupted download stays in the cache folder, and the next request for its address resumes it; a
complete file is deleted after use.
"""

import hashlib
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lib.cancellation import Stopped, TimeLimitError
from lib.convert.locate import is_torch_zip
from lib.errors import UserError, shown
from lib.lora.source import HUB_HOSTS
from lib.network.download import fetch
from lib.network.http import is_web_address, without_secrets
from lib.network.urls import request_rules
from lib.predictors.input_files import check_file
from lib.progress import Report
from lib.settings import current
from lib.storage import zip_archive
from lib.storage.archive import archive_kind, extract_archive
from lib.storage.disk import disk_error
from lib.storage.lock import lock, remove_unused
from lib.text_limits import check_length

MAX_BYTES = 100 * 10**9
"""Limit of a file, and of an archive's content. A 5B model with its text encoder has 42 GB in float32."""
KEPT = 3
"""How many of the newest unfinished downloads are kept."""
FOLDER = "checkpoints"
MAX_NAME = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInput:
    """One checkpoint of a request: `upload` is the input called `name`, `address` the input `name`_url."""

    name: str
    upload: Path | None = None
    address: str = ""

    def __post_init__(self) -> None:
        check_length(f"{self.name}_url", self.address)
        if self.upload is not None and self.address.strip():
            raise UserError(f"Give {self.name} or {self.name}_url, not both.")

    def __bool__(self) -> bool:
        return self.upload is not None or bool(self.address.strip())


@contextmanager
def resolve_input(
    checkpoint: CheckpointInput, *, work: Path, report: Report = print, stop: threading.Event | None = None
) -> Iterator[Path | None]:
    """Yield a checkpoint's path on this disk; None when none is given. Archives are unpacked into `work`.

    An address has to be public and https; paths of this machine need COGVIDEOX_LOCAL_SOURCES=1. Raises
    UserError for others, FetchError, NoSpaceError, and Stopped.
    """
    address, place = checkpoint.address.strip(), work / checkpoint.name
    if not checkpoint:
        yield None
    elif checkpoint.upload is not None:
        path = _named(_readable(check_file(checkpoint.upload)), checkpoint.name, place)
        yield _unpack(path, place, stop)
    elif "://" in address and not address.startswith("file://"):
        with _download(address, name=checkpoint.name, report=report, stop=stop) as path:
            yield _unpack(path, place, stop)
    else:
        yield _unpack(_local(address, checkpoint.name), place, stop)


def _named(path: Path, input_name: str, place: Path) -> Path:
    """Return a link with the input's name to a file that has none, as data URIs; else the path."""
    if path.stem != "file" or path.is_dir():
        return path
    place.mkdir(parents=True, exist_ok=True)
    link = place / f"{input_name}{path.suffix}"
    link.symlink_to(path.resolve())
    return link


def _local(address: str, input_name: str) -> Path:
    path = Path(unquote(address.removeprefix("file://")) if address.startswith("file://") else address)
    if not current().local_sources:
        raise UserError(
            f"{input_name}_url={shown(address)} is not an address; give one that begins with https://, or "
            "upload the file."
        )
    path = path.expanduser()
    if not path.is_absolute():
        raise UserError(
            f"{input_name}_url={shown(address)} is a relative path, and the server runs in a folder of its "
            "own; give the absolute path."
        )
    return _readable(path)


def _readable(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: permission denied.")
    return path


def _unpack(path: Path, place: Path, stop: threading.Event | None) -> Path:
    """Return the content of a zip or tar in a folder with the archive's name; other files as they are."""
    if path.is_dir():
        return path
    is_archive = not is_torch_zip(path) if zip_archive.is_zip(path) else archive_kind(path) == "tar"
    if not is_archive:
        return path
    return extract_archive(path, place / "unpacked" / path.name, max_bytes=MAX_BYTES, stop=stop)


@contextmanager
def _download(address: str, *, name: str, report: Report, stop: threading.Event | None) -> Iterator[Path]:
    url = _file_url(address)
    folder = current().cache / FOLDER
    entry = folder / hashlib.sha256(url.encode()).hexdigest()[:32]
    rules = request_rules(stop=stop, seconds=math.inf)  # COGVIDEOX_PREPARE_SECONDS limits all
    rules.check_url(url)  # before a folder is created for it
    with ExitStack() as held:
        try:
            held.enter_context(lock(entry, report, stop=stop))
            _remove_old_downloads(folder, entry)
        except OSError as error:
            raise disk_error(error, folder) from error
        try:
            target = entry / (_name_in(url) or f"{name}.download")
            path = fetch(url, target, max_bytes=MAX_BYTES, rules=rules, report=report)
        finally:
            _remove_if_empty(entry)
        try:
            yield path
        except (Stopped, TimeLimitError):
            raise  # the same request would need it again
        except Exception:
            shutil.rmtree(entry, ignore_errors=True)  # a corrected file may appear at the same address
            raise
        shutil.rmtree(entry, ignore_errors=True)


def _file_url(address: str) -> str:
    """Return the address of the file that a page on the Hub shows; other addresses as they are."""
    url = address.partition("#")[0]
    if url.lower().startswith("http") and not is_web_address(url):
        raise UserError(
            f"{shown(without_secrets(url))} is not an address; give one that begins with https://."
        )
    return url.replace("/blob/", "/resolve/", 1) if urlsplit(url).hostname in HUB_HOSTS else url


def _name_in(url: str) -> str:
    """Return the file's name at the end of an address, safe as a name on this disk."""
    last = unquote(urlsplit(url).path.rpartition("/")[2])
    return re.sub(r"[^\w.+-]", "_", last).lstrip(".")[-MAX_NAME:]


def _remove_old_downloads(folder: Path, entry: Path) -> None:
    """Remove all but the newest unfinished downloads, except those of running requests."""
    others = [path for path in folder.iterdir() if path.is_dir() and path != entry]
    others.sort(key=lambda path: path.stat().st_mtime)
    remove_unused(others[: max(0, len(others) - KEPT + 1)])


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(os.scandir(folder)):
        folder.rmdir()
