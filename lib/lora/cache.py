"""A LoRA's address -> its file on this disk: fetched once, kept up to a number of bytes, the least used goes.

The cache is `loras` in the service's cache folder, COGVIDEOX_LORA_CACHE_GB large (20). An entry is a folder
that appears by renaming; it is not asked for again while it is there, whatever has become of its address.
What a request's fetch leaves when it fails or is cancelled: nothing.
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.lora.file import PICKLES, kind_of
from lib.lora.source import REPLICATE_HINT, Address
from lib.network import hub
from lib.network.download import read, sha256_of
from lib.network.http import FetchError, Rules
from lib.network.urls import operator_rules, request_rules, save_url
from lib.progress import Report
from lib.storage.archive import extract_tar
from lib.storage.disk import NoSpaceError, disk_error, size_text
from lib.storage.lock import lock
from lib.weights.cache import cache_folder

WEIGHTS, CONFIG, RECORD = "lora.safetensors", "adapter_config.json", "source.json"
CACHE_GB = 20.0
# A LoRA of rank 128 on four projections of 5B has 132 M parameters: 0.5 GB in float32.
MAX_FILE_BYTES = 4 * 10**9
# A training's tar holds captions, clips and perhaps a checkpoint beside the LoRA.
MAX_UNPACKED_BYTES = 16 * 10**9
CONFIG_BYTES = 1 << 20
LOCK_POLL_SECONDS = 0.2
PREFERRED = ("pytorch_lora_weights.safetensors", "lora.safetensors", "adapter_model.safetensors")
LISTED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A LoRA's file, and the adapter_config.json that came with it."""

    file: Path
    config: dict | None = None


def max_bytes() -> int:
    """Return how large one LoRA may be: MAX_FILE_BYTES, or the whole cache where that is smaller."""
    return min(MAX_FILE_BYTES, _cache_bytes())


def locate(address: Address, *, stop: threading.Event | None = None, report: Report = print) -> Found:
    """Return the file, fetching it when it is not in the cache.

    Raises UserError when there is no such LoRA, it is of another kind or too large, and Stopped.
    """
    try:
        if address.place == "local" and address.file.is_dir():
            return _in_folder(address.file, given=address.given)
        if address.place == "local" and kind_of(address.file, name=address.given) == "safetensors":
            config = _read_config(address.file.with_name(CONFIG), given=address.given)
            return Found(file=address.file, config=config)
    except OSError as error:
        raise UserError(f"{address.given} cannot be read: {error.strerror or error}.") from error
    folder = cache_folder() / "loras"
    entry = folder / hashlib.sha256(address.key.encode()).hexdigest()[:32]
    try:
        while not _used_now(entry):
            with lock(entry, report, wait=False) as held:
                if held and not _is_whole(entry):
                    _fetch_entry(address, entry, stop, report)
            if not held and (stop or threading.Event()).wait(LOCK_POLL_SECONDS):
                raise Stopped
    except OSError as error:
        raise disk_error(error, folder) from error
    return Found(file=entry / WEIGHTS, config=_read_config(entry / CONFIG, given=address.given))


def _used_now(entry: Path) -> bool:
    """Mark an entry as the last that was used; False when it is not there, or not any more."""
    try:
        os.utime(entry)
    except FileNotFoundError:
        return False
    return _is_whole(entry)


def _is_whole(entry: Path) -> bool:
    return (entry / RECORD).is_file() and (entry / WEIGHTS).is_file()


def _fetch_entry(address: Address, entry: Path, stop: threading.Event | None, report: Report) -> None:
    """Make the entry; call it with the entry's lock held."""
    work = entry.with_name(entry.name + ".partial")
    _remove(work)
    _remove(entry)
    try:
        work.mkdir(parents=True)
        content = work / "content"
        content.mkdir()
        record = _bring(address, work, content, stop, report)
        record |= {"source": address.label, "sha256": sha256_of(content / WEIGHTS)}
        (content / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _make_room(entry, _bytes_of(content))
        os.replace(content, entry)
    finally:
        _remove(work)


def _bring(
    address: Address, work: Path, content: Path, stop: threading.Event | None, report: Report
) -> dict[str, object]:
    """Put the LoRA and its configuration into `content`; return what is worth recording about them."""
    got, record, config = work / "download", {}, None
    if address.place == "data":
        got.write_bytes(address.content)
    elif address.place == "local":
        got = address.file
    else:
        rules = (
            operator_rules(stop=stop)
            if address.trusted
            else request_rules(stop=stop, trusted=hub.endpoint() if address.place == "hub" else None)
        )
        report(f"lora: downloading {address.label}")
        if address.place == "hub":
            record, config = _from_hub(address, got, rules)
        else:
            save_url(address.url, got, max_bytes=max_bytes(), rules=rules)
    # A local file is only read: of those, archives alone come here.
    if address.place != "local" and kind_of(got, name=address.given) == "safetensors":
        os.replace(got, content / WEIGHTS)
    else:
        found = _unpacked(got, work / "unpacked", given=address.given)
        os.replace(found.file, content / WEIGHTS)
        config = config or found.config
    if (size := (content / WEIGHTS).stat().st_size) > max_bytes():
        most = size_text(max_bytes())
        raise UserError(f"{address.given} holds a LoRA of {size_text(size)}; at most {most} are allowed.")
    if config is not None:
        (content / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return record


def _from_hub(address: Address, got: Path, rules: Rules) -> tuple[dict[str, object], dict | None]:
    try:
        listing = hub.listing(address.repository, address.revision, rules=rules)
    except hub.NoRepositoryError as error:
        raise UserError(f"{error} {REPLICATE_HINT}") from error
    files = {file.path: file for file in listing.files}
    path = _chosen_in_repository(address, list(files))
    file, headers = files[path], hub.headers()
    save_url(file.url, got, max_bytes=max_bytes(), rules=rules, headers=headers)
    if file.sha256 is not None and sha256_of(got) != file.sha256.lower():
        raise FetchError(f"Cannot download {address.label}: it was damaged on the way. Start again.")
    beside = files.get(str(PurePosixPath(path).with_name(CONFIG)))
    config = None
    if beside is not None:
        config = _parsed_config(
            read(beside.url, max_bytes=CONFIG_BYTES, headers=headers, rules=rules), given=address.given
        )
    return {"commit": listing.commit, "file": path}, config


def _chosen_in_repository(address: Address, paths: list[str]) -> str:
    if address.path in paths:
        return address.path
    below = [path for path in paths if not address.path or path.startswith(f"{address.path}/")]
    if not below:
        raise UserError(
            f"{address.repository} has no file {address.path!r} at {address.revision}. "
            f"It has: {_listed(paths)}."
        )
    return choose(below, given=address.given)


def choose(paths: Sequence[str], *, given: str) -> str:
    """Return which of several files is the LoRA: the only one, or the nearest one with a LoRA's usual name.

    Raises UserError listing them when that is not clear.
    """
    places = [
        place
        for place in map(PurePosixPath, paths)
        if not any(part.startswith((".", "__MACOSX")) for part in place.parts)
    ]
    weights = [place for place in places if place.suffix == ".safetensors"]
    if len(weights) == 1:
        return str(weights[0])
    usual = [place for place in weights if place.name in PREFERRED]
    nearest = min((len(place.parts) for place in usual), default=0)
    usual = [place for place in usual if len(place.parts) == nearest]
    first = [place for name in PREFERRED for place in usual if place.name == name]
    if first and len({place.parent for place in usual}) == 1:
        return str(first[0])
    if weights:
        raise UserError(
            f"{given} holds several .safetensors files: {_listed(map(str, weights))}. Name one, as in "
            "owner/name/file.safetensors, or give the address of that file."
        )
    pickles = [str(place) for place in places if place.suffix.lower() in PICKLES]
    only = f"; {_listed(pickles)} could run any code and is not loaded" if pickles else ""
    raise UserError(f"{given} holds no .safetensors file{only}. Give one that does.")


def _listed(paths) -> str:  # type: ignore[no-untyped-def]
    names = sorted(paths)
    return ", ".join(names[:LISTED]) + f" and {len(names) - LISTED} more" * (len(names) > LISTED)


def _unpacked(archive: Path, target: Path, *, given: str) -> Found:
    try:
        extract_tar(archive, target, max_bytes=MAX_UNPACKED_BYTES)
    except NoSpaceError:
        raise
    except UserError as error:
        said = str(error).removeprefix(archive.name).lstrip(": ")
        raise UserError(f"{given} cannot be unpacked: {said}") from error
    return _in_folder(target, given=given)


def _in_folder(folder: Path, *, given: str) -> Found:
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    file = folder / choose(paths, given=given)
    if kind_of(file, name=given) != "safetensors":
        raise UserError(f"{given}: {file.name} in it is no safetensors file.")
    return Found(file=file, config=_read_config(file.with_name(CONFIG), given=given))


def _read_config(path: Path, *, given: str) -> dict | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return _parsed_config(file.read(CONFIG_BYTES), given=given)


def _parsed_config(content: bytes, *, given: str) -> dict:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{given}: its {CONFIG} is no JSON object.")
    return config


def _cache_bytes() -> int:
    text = os.environ.get("COGVIDEOX_LORA_CACHE_GB") or str(CACHE_GB)
    try:
        size = float(text) * 1e9
        if 0 < size < float("inf"):
            return int(size)
    except ValueError:
        pass
    raise UserError(f"COGVIDEOX_LORA_CACHE_GB={text} is not a size in GB above 0; empty means {CACHE_GB:g}.")


def _make_room(entry: Path, needed: int) -> None:
    """Remove entries, the least recently used first, until `needed` more bytes are within the bound."""
    folder = entry.parent
    for left in folder.glob("*.gone"):
        _remove(left)
    for left in folder.glob("*.partial"):
        if left.name != f"{entry.name}.partial":
            with lock(left.with_suffix(""), lambda line: None, wait=False) as nobodys:
                if nobodys:  # of a process that was killed
                    _remove(left)
    used = {path: _bytes_of(path) for path in folder.iterdir() if _is_whole(path)}
    for path in sorted(used, key=lambda path: path.stat().st_mtime):
        if sum(used.values()) + needed <= _cache_bytes():
            break
        gone = path.with_name(f"{path.name}.{secrets.token_hex(4)}.gone")
        os.replace(path, gone)  # whole until it is gone, whoever looks
        _remove(gone)
        del used[path]


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
