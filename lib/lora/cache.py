"""Download LoRAs once: an address -> its file on this disk, in a cache of limited size.

The cache is the folder `loras` in the service's cache folder, of up to COGVIDEOX_LORA_CACHE_GB; the least
recently used entries are removed first. An entry is a folder that appears by renaming, and its address is not
asked again while it exists. A request that fails or is cancelled leaves nothing.
"""

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.lora.file import kind_of
from lib.lora.keys import LoraFile, Shapes, read_lora
from lib.lora.source import PICKLES, REPLICATE_HINT, Address, Choice, max_bytes
from lib.models.specs import ModelSpec
from lib.network import hub
from lib.network.download import sha256_of
from lib.network.http import FetchError, Source, read, save
from lib.network.transport import Rules
from lib.network.urls import operator_rules, request_rules
from lib.progress import Report, silent
from lib.settings import current
from lib.storage.archive import extract_tar
from lib.storage.disk import NoSpaceError, disk_error, partial_path, remove, size_text
from lib.storage.lock import lock

WEIGHTS, CONFIG, RECORD = "lora.safetensors", "adapter_config.json", "source.json"
# A training's tar also holds captions, clips and perhaps a checkpoint.
MAX_UNPACKED_BYTES = 16 * 10**9
MAX_CONFIG_BYTES = 1 << 20
LOCK_POLL_SECONDS = 0.2
PREFERRED = ("pytorch_lora_weights.safetensors", "lora.safetensors", "adapter_model.safetensors")
LISTED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalLora:
    """A LoRA's file on this disk, and the adapter_config.json that came with it."""

    file: Path
    config: dict[str, Any] | None = None


def open_lora(
    choice: Choice, *, shapes: Shapes, spec: ModelSpec, stop: threading.Event | None, report: Report
) -> LoraFile:
    """Locate a request's LoRA and read its file. Raises as `locate` and `read_lora` do."""

    def read() -> LoraFile:
        found = locate(choice.address, stop=stop, report=report)
        return read_lora(
            found.file,
            name=choice.address.name,
            shapes=shapes,
            spec=spec,
            adapter_config=found.config,
            alpha=choice.alpha,
            alpha_name=f"{choice.slot}_alpha",
        )

    try:
        return read()
    except FileNotFoundError:  # another process has just removed it to make room
        return read()


def locate(address: Address, *, stop: threading.Event | None = None, report: Report = print) -> LocalLora:
    """Return a LoRA's file, downloading it unless the cache has it.

    Raises UserError when there is no such LoRA, it is of another kind or too large, and Stopped.
    """
    try:
        if address.place == "local" and address.file.is_dir():
            return _in_folder(address.file, name=address.name)
        if address.place == "local" and kind_of(address.file, name=address.name) == "safetensors":
            config = read_adapter_config(address.file.with_name(CONFIG), name=address.name)
            return LocalLora(file=address.file, config=config)
    except OSError as error:
        raise UserError(f"{address.name} cannot be read: {error.strerror or error}.") from error
    folder = current().cache / "loras"
    entry = folder / hashlib.sha256(address.key.encode()).hexdigest()[:32]
    try:
        while not _touch(entry):
            with lock(entry, report, wait=False) as held:
                if held and not _is_complete(entry):
                    _create_entry(address, entry, stop, report)
            if not held and (stop or threading.Event()).wait(LOCK_POLL_SECONDS):
                raise Stopped
    except OSError as error:
        raise disk_error(error, folder) from error
    return LocalLora(file=entry / WEIGHTS, config=read_adapter_config(entry / CONFIG, name=address.name))


def _touch(entry: Path) -> bool:
    """Mark an entry as the most recently used; False when it is missing or incomplete."""
    try:
        os.utime(entry)
    except FileNotFoundError:
        return False
    return _is_complete(entry)


def _is_complete(entry: Path) -> bool:
    return (entry / RECORD).is_file() and (entry / WEIGHTS).is_file()


def _create_entry(address: Address, entry: Path, stop: threading.Event | None, report: Report) -> None:
    """Create the entry. The caller holds its lock."""
    work = partial_path(entry)
    remove(work)
    remove(entry)
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(mode=0o700)
        content = work / "content"
        content.mkdir()
        record = _fetch(address, work, content, stop, report)
        record |= {"source": address.label, "sha256": sha256_of(content / WEIGHTS)}
        (content / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _make_private(content)
        _make_room(entry, _bytes_of(content))
        os.replace(content, entry)
    finally:
        remove(work)


def _make_private(folder: Path) -> None:
    """Let only the owner read what a request brought, whatever the umask."""
    folder.parent.parent.chmod(0o700)
    folder.chmod(0o700)
    for file in folder.iterdir():
        file.chmod(0o600)


def _fetch(
    address: Address, work: Path, content: Path, stop: threading.Event | None, report: Report
) -> dict[str, Any]:
    """Put the LoRA and its configuration into `content` and return facts about the source to record."""
    download, record, config = work / "download", {}, None
    if address.place == "data":
        download.write_bytes(address.content)
    elif address.place == "local":
        download = address.file
    else:
        rules = (
            operator_rules(stop=stop)
            if address.trusted
            else request_rules(stop=stop, trusted=hub.endpoint() if address.place == "hub" else None)
        )
        report(f"lora: downloading {address.label}")
        if address.place == "hub":
            record, config = _fetch_from_hub(address, download, rules)
        else:
            save(Source(url=address.url, max_bytes=max_bytes(), rules=rules), download)
    # Of local files only archives come here, and the owner's file stays where it is.
    if address.place != "local" and kind_of(download, name=address.name) == "safetensors":
        os.replace(download, content / WEIGHTS)
    else:
        found = _unpack(download, work / "unpacked", name=address.name)
        os.replace(found.file, content / WEIGHTS)
        config = config or found.config
    if (size := (content / WEIGHTS).stat().st_size) > (limit := max_bytes()):
        raise UserError(
            f"{address.name} holds a LoRA of {size_text(size)}; at most {size_text(limit)} are allowed."
        )
    if config is not None:
        (content / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return record


def _fetch_from_hub(
    address: Address, target: Path, rules: Rules
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Download the LoRA and return facts to record, and its adapter_config.json."""
    try:
        headers = hub.operator_headers() if address.trusted else hub.request_headers(address.repository)
        listing = hub.listing(address.repository, address.revision, headers=headers, rules=rules)
    except hub.NoRepositoryError as error:
        raise UserError(f"{error} {REPLICATE_HINT}") from error
    files = {file.path: file for file in listing.files}
    path = _choose_in_repository(address, list(files))
    file = files[path]
    save(Source(url=file.url, headers=headers, max_bytes=max_bytes(), rules=rules), target)
    if file.sha256 is not None and sha256_of(target) != file.sha256.lower():
        raise FetchError(
            f"Cannot download {address.label}: its checksum is wrong; it was damaged in transit. Try again."
        )
    config = None
    if (found := files.get(str(PurePosixPath(path).with_name(CONFIG)))) is not None:
        source = Source(url=found.url, headers=headers, max_bytes=MAX_CONFIG_BYTES, rules=rules)
        config = _parse_config(read(source), name=address.name)
    return {"commit": listing.commit, "file": path}, config


def _choose_in_repository(address: Address, paths: list[str]) -> str:
    if address.path in paths:
        return address.path
    below = [path for path in paths if not address.path or path.startswith(f"{address.path}/")]
    if not below:
        raise UserError(
            f"{address.repository} has no file {address.path!r} at {address.revision}. "
            f"It has: {_list_names(paths)}."
        )
    return choose(below, name=address.name)


def choose(paths: Sequence[str], *, name: str) -> str:
    """Return which of several files is the LoRA: the only one, or the topmost with a LoRA's usual name.

    Raises UserError listing them when that is ambiguous.
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
            f"{name} has several .safetensors files: {_list_names(map(str, weights))}. Name one, as in "
            "owner/name/file.safetensors, or give the address of that file."
        )
    pickles = [str(place) for place in places if place.suffix.lower() in PICKLES]
    only = f"; {_list_names(pickles)} could run any code and is not loaded" if pickles else ""
    raise UserError(f"{name} has no .safetensors file{only}. Give one that has.")


def _list_names(paths: Iterable[str]) -> str:
    names = sorted(paths)
    return ", ".join(names[:LISTED]) + f" and {len(names) - LISTED} more" * (len(names) > LISTED)


def _unpack(archive: Path, target: Path, *, name: str) -> LocalLora:
    try:
        extract_tar(archive, target, max_bytes=MAX_UNPACKED_BYTES)
    except NoSpaceError:
        raise
    except UserError as error:
        reason = str(error).removeprefix(archive.name).lstrip(": ")
        raise UserError(f"{name} cannot be unpacked: {reason}") from error
    return _in_folder(target, name=name)


def _in_folder(folder: Path, *, name: str) -> LocalLora:
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    file = folder / choose(paths, name=name)
    if kind_of(file, name=name) != "safetensors":
        raise UserError(f"{name}: its {file.name} is not a safetensors file.")
    return LocalLora(file=file, config=read_adapter_config(file.with_name(CONFIG), name=name))


def read_adapter_config(path: Path, *, name: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return _parse_config(file.read(MAX_CONFIG_BYTES), name=name)


def _parse_config(content: bytes, *, name: str) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{name}: its {CONFIG} is not a JSON object.")
    return config


def _make_room(entry: Path, needed: int) -> None:
    """Remove entries, the least recently used first, until `needed` more bytes fit into the cache."""
    folder, limit = entry.parent, current().lora_cache_bytes
    for left in folder.glob("*.gone"):
        remove(left)
    for left in folder.glob("*.partial"):
        if left != partial_path(entry):
            with lock(left.with_suffix(""), silent, wait=False) as unowned:
                if unowned:  # left by a killed process
                    remove(left)
    used = {path: _bytes_of(path) for path in folder.iterdir() if _is_complete(path)}
    for path in sorted(used, key=lambda path: path.stat().st_mtime):
        if sum(used.values()) + needed <= limit:
            break
        gone = path.with_name(f"{path.name}.{secrets.token_hex(4)}.gone")
        os.replace(path, gone)  # readers see a complete entry or none
        remove(gone)
        del used[path]


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
