"""Find the folder of a model on this disk by name: embedded, the user's own, or downloaded once.

    locate("tiny-t2v")                  an embedded model
    locate("cogvideox-5b")              a name of weights/manifest.toml
    locate("/data/my-model")            a folder
    locate("owner/name@revision")       a repository on the Hugging Face Hub

The cache is `COGVIDEOX_CACHE`, by default ~/.cache/cogvideox. In it a model's folder appears by renaming,
with a record of where it came from; until then its files are in a sibling `.partial`, from which the next
start continues. Only this module downloads models. LoRAs, data sets and checkpoints to convert that requests
name are downloaded by lib/lora/cache.py, lib/datasets/source.py and lib/convert/.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lib.errors import UserError, shown
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
from lib.weights.cache import RECORD, cache_folder, is_complete, missing_or_damaged, model_folder
from lib.weights.manifest import MANIFEST, Source, read_manifest

MAX_EXPANSION = 10
"""An archive that unpacks to more than this many times its size is refused: weights hardly compress."""
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
    """Return the complete folder of a model, downloading it into the cache if it is not there yet.

    A complete folder costs a few file look-ups: no network, no waiting. Two processes at once download once.
    A converted model without text encoder, tokenizer or VAE gets those of a downloaded one.

    Args:
        name: a name of the manifest, the path of a folder, or a Hub repository "owner/name" or
            "owner/name@revision".
        check: called with the model's model_index.json, or else its config.json; raises for a model that the
            caller cannot use. For a Hub repository it is called before the other files are downloaded. With a
            `check`, a model that has neither file is refused.
        report: receives one line per event.

    Raises:
        UserError: there is no such model, a folder is not complete, the download fails, or `HF_HUB_OFFLINE`,
            set by the user, forbids it.
    """
    folder = _find(name, check, manifest or MANIFEST, cache or cache_folder(), report)
    if check is not None:
        index = next((folder / file for file in INDICES if (folder / file).is_file()), None)
        if index is None:
            raise _without_index(name)
        check(read_index(index.read_bytes(), of=name))
    return folder


def _find(name: str, check: Check | None, manifest: Path, cache: Path, report: Report) -> Path:
    sources = read_manifest(manifest)
    source = sources.get(name)
    if source is None:
        folder = Path(name).expanduser()
        if name and folder.exists():
            return _with_shared_components(folder, sources, cache) or _complete_or_raise(folder)
        source = _hub_source(name, sources)
    elif source.path is not None:
        return _complete_or_raise(manifest.parent / source.path)
    final = cache / source.key
    if is_complete(final):
        _remove_stale_work(final, report)
        return model_folder(final)
    if forbidden():
        raise UserError(
            f"{name} is not in {final.parent}, and HF_HUB_OFFLINE forbids downloading it; unset it once."
        )
    try:
        return _download(source, final, check, report)
    except OSError as error:
        raise UserError(
            f"{name} cannot be saved in {final.parent}: {error}. Set COGVIDEOX_CACHE to another folder."
        ) from error


def downloaded() -> list[Path]:
    """Return the folders of the manifest's models that are complete in the cache."""
    return _downloaded(read_manifest(), cache_folder())


def _hub_source(name: str, sources: dict[str, Source]) -> Source:
    repository, at, revision = name.partition("@")
    is_valid = hub.REPOSITORY.fullmatch(repository) and ".." not in repository and (revision or not at)
    if not is_valid:
        raise UserError(
            f"There is no model {shown(name)}: it is neither a folder on this machine, nor a Hub repository "
            f"(owner/name), nor one of {', '.join(sources)}."
        )
    return Source(name=name, repository=repository, revision=revision or "main")


def _complete_or_raise(folder: Path) -> Path:
    if not folder.is_dir():
        problem = f"{folder} is not a folder; a model is a folder with {INDEX} in it."
        raise UserError(problem + _sat_advice(folder))
    if missing := missing_or_damaged(folder):
        names = f"{', '.join(missing[:5])}{' ...' * (len(missing) > 5)}"
        problem = f"{folder} is not a complete model; missing: {names}."
        raise UserError(problem + _sat_advice(folder) * (missing == [INDEX]))
    return folder


def _sat_advice(path: Path) -> str:
    """Return how to convert a SAT checkpoint; an empty text for anything else."""
    files = [*path.glob("*.pt"), *path.glob("*/*.pt")] if path.is_dir() else [path]
    if not any(file.suffix == ".pt" for file in files):
        return ""
    return (
        f" It looks like a SAT checkpoint: script/convert {path}, or the predictor predict_convert, converts "
        "it."
    )


def _with_shared_components(folder: Path, sources: dict[str, Source], cache: Path) -> Path | None:
    """Return a converted model completed with a downloaded one's components; None if it needs none."""
    if not folder.is_dir() or not shared_components.can_be_completed(folder):
        return None
    return shared_components.complete(folder, _downloaded(sources, cache), cache=cache)


def _downloaded(sources: dict[str, Source], cache: Path) -> list[Path]:
    kept = (cache / source.key for source in sources.values() if source.path is None)
    return [model_folder(each) for each in kept if is_complete(each)]


def _without_index(name: str) -> UserError:
    return UserError(
        f"{name} has neither {' nor '.join(INDICES)}: it is not a model that can be loaded here."
    )


def _download(source: Source, final: Path, check: Check | None, report: Report) -> Path:
    with lock(final, report):
        if is_complete(final):  # another process was faster
            return model_folder(final)
        work = final.with_name(final.name + ".partial")
        if final.exists():
            missing = ", ".join(missing_or_damaged(final)[:3])
            report(f"{final} is damaged ({missing} missing or cut off); downloading it again")
            shutil.rmtree(final)
        report(f"{source.name}: downloading into {final}" + (f"; {source.licence}" if source.licence else ""))
        try:
            if source.tar is not None:
                content, record = _from_tar(source, source.tar, work, report)
            else:
                content, record = _from_hub(source, work, check, report)
            model = find_model(content)
            missing = [INDEX] if model is None else missing_files(model)
            if model is None or missing:
                shutil.rmtree(work)
                names = ", ".join(missing[:5])
                raise UserError(f"{source.name}: the download is not a complete model; missing: {names}.")
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


def _from_tar(source: Source, url: str, work: Path, report: Report) -> tuple[Path, dict]:
    archive, content = work / "archive.tar", work / "content"
    if content.exists():
        shutil.rmtree(content)  # unpacked by a process that was killed before it finished
    try:
        if not archive.exists():
            size = source.size or remote_size(url) or 0
            _require_room(work, 2 * size)  # the archive and its content
            fetch(url, archive, sha256=source.sha256, size=source.size, report=report)
        else:
            _require_room(work, 2 * archive.stat().st_size)
    except FetchError as error:
        if not source.alternative:
            raise
        alternative = f"The same checkpoint is on the Hugging Face Hub: {source.alternative}."
        raise FetchError(f"{error} {alternative}", status=error.status) from error
    report(f"{source.name}: unpacking")
    try:
        extract_tar(archive, content, max_bytes=MAX_EXPANSION * archive.stat().st_size)
    except NoSpaceError:
        raise
    except UserError:
        shutil.rmtree(work)
        raise
    digest = source.sha256 or sha256_of(archive)
    return content, {"source": without_secrets(url), "sha256": digest, "licence": source.licence}


def _from_hub(source: Source, work: Path, check: Check | None, report: Report) -> tuple[Path, dict]:
    repository = source.repository or source.name
    snapshot = hub_model.snapshot(repository, source.revision)
    headers = hub.operator_headers()
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
    record = {"source": repository, "revision": source.revision, "commit": snapshot.commit}
    return content, {**record, "licence": source.licence}


def _require_room(work: Path, total_bytes: int) -> None:
    present = sum(path.stat().st_blocks * 512 for path in _files(work))
    hint = ", or set COGVIDEOX_CACHE to a folder on another disk"
    require_free_space(work, total_bytes - present, hint=hint)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _remove_leftovers(work: Path, *, keep: bool) -> None:
    """Remove the working folder, unless it is to be kept for the next start and contains files."""
    if work.exists() and not (keep and _files(work)):
        shutil.rmtree(work)


def _remove_stale_work(final: Path, report: Report) -> None:
    """Remove the working folder next to a complete one, left by a download killed at its very end."""
    work = final.with_name(final.name + ".partial")
    if not work.exists():
        return
    try:
        with lock(final, report, wait=False) as held:
            if held and is_complete(final):
                _remove_leftovers(work, keep=False)
    except OSError as error:
        report(f"{work} is left over from a download and cannot be removed: {error}")
