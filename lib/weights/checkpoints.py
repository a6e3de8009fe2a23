"""A model's name -> its whole folder on this disk: embedded, the user's own, or downloaded once.

    locate("tiny-t2v")                  an embedded model
    locate("cogvideox-5b")              a name of weights/manifest.toml
    locate("/data/my-model")            a folder
    locate("owner/name@revision")       a repository on the Hugging Face Hub

The cache is `COGVIDEOX_CACHE`, by default ~/.cache/cogvideox. In it a model's folder appears by renaming,
with a record of where it came from; until then the work happens in a sibling `.partial`, which the next
start continues. Models come from the network through this module alone; what requests name is fetched by
lib/lora/cache.py, lib/datasets/source.py and lib/convert/, and uploads go through lib/network/upload.py.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lib.errors import UserError
from lib.models.layout import INDEX, INDICES, find_model, missing_files, read_index
from lib.network import http, hub
from lib.network.download import fetch, remote_size, sha256_of
from lib.network.http import FetchError, read, without_secrets
from lib.network.offline import forbidden
from lib.progress import Report
from lib.storage.archive import extract_tar
from lib.storage.disk import NoSpaceError, require_free_space
from lib.storage.lock import lock
from lib.weights import hub_model, shared_components
from lib.weights.cache import RECORD, cache_folder, is_whole, lacks, model_folder
from lib.weights.manifest import MANIFEST, Source, read_manifest

# Weights hardly compress: what unpacks to more than this many times its archive is no checkpoint.
UNPACKED_PER_ARCHIVE_BYTE = 10
INDEX_BYTES = 1 << 20

Check = Callable[[dict], None]


def locate(
    name: str,
    *,
    check: Check | None = None,
    manifest: Path | None = None,
    cache: Path | None = None,
    report: Report = print,
) -> Path:
    """Return the whole folder of a model, downloading it into the cache when it is not there yet.

    `name` is a name of the manifest, the path of a folder, or a Hub repository "owner/name", also
    "owner/name@revision". A folder that is whole costs a few file look-ups: no network, no waiting. Two
    processes at once download once. A converted model without text encoder, tokenizer or VAE borrows that
    of a downloaded one. `report` receives one line per event.

    `check` receives the model's model_index.json, or without one its config.json, and raises for a model that
    the caller cannot use: of a Hub repository before the rest is downloaded, of an archive when it is
    unpacked. With a `check`, a model that has neither is refused.

    Raises UserError when there is no such model, a folder is not whole, the download fails, or
    `HF_HUB_OFFLINE`, set by the user, forbids it.
    """
    folder = _located(name, check, manifest or MANIFEST, cache or cache_folder(), report)
    if check is not None:
        index = next((folder / file for file in INDICES if (folder / file).is_file()), None)
        if index is None:
            raise _without_index(name)
        check(read_index(index.read_bytes(), of=name))
    return folder


def _located(name: str, check: Check | None, manifest: Path, cache: Path, report: Report) -> Path:
    sources = read_manifest(manifest)
    source = sources.get(name)
    if source is None:
        folder = Path(name).expanduser()
        if name and folder.exists():
            return _completed(folder, sources, cache) or _whole_or_raise(folder)
        source = _hub_source(name, sources)
    elif source.path is not None:
        return _whole_or_raise(manifest.parent / source.path)
    final = cache / source.key
    if is_whole(final):
        _remove_what_a_kill_left(final, report)
        return model_folder(final)
    if forbidden():
        raise UserError(
            f"{name} is not in {final.parent}, and HF_HUB_OFFLINE forbids to download it; unset it once."
        )
    try:
        return _download(source, final, check, report)
    except OSError as error:
        raise UserError(
            f"{name} cannot be kept in {final.parent}: {error}. Set COGVIDEOX_CACHE elsewhere."
        ) from error


def downloaded() -> list[Path]:
    """Return the folders of the manifest's models that are in the cache and whole."""
    return _downloaded(read_manifest(), cache_folder())


def _hub_source(name: str, sources: dict[str, Source]) -> Source:
    repository, at, revision = name.partition("@")
    sound = hub.REPOSITORY.fullmatch(repository) and ".." not in repository and (revision or not at)
    if not sound:
        raise UserError(
            f"There is no model {name!r}: it is no folder on this machine, no Hub repository "
            f"(owner/name) and none of {', '.join(sources)}."
        )
    return Source(name=name, repository=repository, revision=revision or "main")


def _whole_or_raise(folder: Path) -> Path:
    if not folder.is_dir():
        said = f"{folder} is not a folder; a model is a folder with {INDEX} in it."
        raise UserError(said + _if_from_sat(folder))
    if lost := lacks(folder):
        said = f"{folder} is not a whole model; it lacks {', '.join(lost[:5])}{' ...' * (len(lost) > 5)}."
        raise UserError(said + _if_from_sat(folder) * (lost == [INDEX]))
    return folder


def _if_from_sat(path: Path) -> str:
    """What makes a model of a checkpoint of SAT's code, where that is what was named."""
    files = [*path.glob("*.pt"), *path.glob("*/*.pt")] if path.is_dir() else [path]
    if not any(file.suffix == ".pt" for file in files):
        return ""
    return (
        f" It looks like a checkpoint of SAT: script/convert {path}, or the predictor predict_convert, makes "
        "a model of it."
    )


def _completed(folder: Path, sources: dict[str, Source], cache: Path) -> Path | None:
    """A converted model with what a downloaded one lends it; None where nothing can be lent."""
    if not folder.is_dir() or not shared_components.can_be_completed(folder):
        return None
    return shared_components.completed(folder, _downloaded(sources, cache), cache=cache)


def _downloaded(sources: dict[str, Source], cache: Path) -> list[Path]:
    kept = (cache / source.key for source in sources.values() if source.path is None)
    return [model_folder(each) for each in kept if is_whole(each)]


def _without_index(name: str) -> UserError:
    return UserError(f"{name} has no {' and no '.join(INDICES)}: it is no model that can be loaded here.")


def _download(source: Source, final: Path, check: Check | None, report: Report) -> Path:
    with lock(final, report):
        if is_whole(final):  # another process was faster
            return model_folder(final)
        work = final.with_name(final.name + ".partial")
        if final.exists():
            report(f"{final} is damaged (it lacks {', '.join(lacks(final)[:3])}); downloading it again")
            shutil.rmtree(final)
        report(f"{source.name}: downloading into {final}" + (f"; {source.licence}" if source.licence else ""))
        try:
            content, record = (
                _from_tar(source, work, report) if source.tar else _from_hub(source, work, check, report)
            )
            model = find_model(content)
            if model is None or (lost := missing_files(model)):
                shutil.rmtree(work)
                what = "model_index.json" if model is None else ", ".join(lost[:5])
                raise UserError(f"{source.name}: what was downloaded is not a whole model; it lacks {what}.")
            record["model"] = str(model.relative_to(content))
            record["files"] = {
                str(path.relative_to(content)): path.stat().st_size
                for path in _files(content)
                if path != content / RECORD
            }
            (content / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.replace(content, final)
        finally:
            _remove_leftovers(work, keep=not final.exists())
    return model_folder(final)


def _from_tar(source: Source, work: Path, report: Report) -> tuple[Path, dict]:
    archive, content = work / "archive.tar", work / "content"
    if content.exists():
        shutil.rmtree(content)  # unpacked by a process that was killed before it finished
    try:
        if not archive.exists():
            size = source.size or remote_size(source.tar) or 0
            # The archive and its content, side by side for a while.
            _require_room(work, 2 * size)
            fetch(source.tar, archive, sha256=source.sha256, size=source.size, report=report)
        else:
            _require_room(work, 2 * archive.stat().st_size)
    except FetchError as error:
        other = (
            f" The same checkpoint is on the Hugging Face Hub: {source.alternative}."
            if source.alternative
            else ""
        )
        raise FetchError(f"{error}{other}", status=error.status) from error
    report(f"{source.name}: unpacking")
    try:
        extract_tar(archive, content, max_bytes=UNPACKED_PER_ARCHIVE_BYTE * archive.stat().st_size)
    except NoSpaceError:
        raise
    except UserError:
        shutil.rmtree(work)
        raise
    digest = source.sha256 or sha256_of(archive)
    return content, {"source": without_secrets(source.tar), "sha256": digest, "licence": source.licence}


def _from_hub(source: Source, work: Path, check: Check | None, report: Report) -> tuple[Path, dict]:
    snapshot = hub_model.snapshot(source.repository, source.revision)
    headers = hub.headers()
    if check is not None:
        listed = {file.path: file for file in snapshot.files}
        index = next((listed[path] for path in INDICES if path in listed), None)
        if index is None:
            raise _without_index(source.name)
        content = read(http.Source(url=index.url, headers=headers, max_bytes=INDEX_BYTES))
        check(read_index(content, of=source.name))
    content = work / snapshot.commit
    if work.exists():
        for other in work.iterdir():  # of another commit: the branch has moved since
            if other != content:
                shutil.rmtree(other)
    _require_room(work, sum(file.size or 0 for file in snapshot.files))
    for file in snapshot.files:
        known = source.files.get(file.path, {})
        size, sha256 = known.get("size", file.size), known.get("sha256", file.sha256)
        fetch(file.url, content / file.path, size=size, sha256=sha256, headers=headers, report=report)
    record = {"source": source.repository, "revision": source.revision, "commit": snapshot.commit}
    return content, {**record, "licence": source.licence}


def _require_room(work: Path, whole_bytes: int) -> None:
    there = sum(path.stat().st_blocks * 512 for path in _files(work))
    hint = ", or set COGVIDEOX_CACHE to a folder on another disk"
    require_free_space(work, whole_bytes - there, hint=hint)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _remove_leftovers(work: Path, *, keep: bool) -> None:
    # Kept for the next start: whole files and downloads that can be continued. Empty folders are neither.
    if work.exists() and not (keep and _files(work)):
        shutil.rmtree(work)


def _remove_what_a_kill_left(final: Path, report: Report) -> None:
    """Remove the archive beside a whole folder, when its download was killed just before it was done."""
    work = final.with_name(final.name + ".partial")
    if not work.exists():
        return
    try:
        with lock(final, report, wait=False) as held:
            if held and is_whole(final):
                _remove_leftovers(work, keep=False)
    except OSError as error:
        report(f"{work} is left over from the download and cannot be removed: {error}")
