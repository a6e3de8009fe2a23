"""What a model folder has to hold before anything is loaded from it."""

import json
import re
from pathlib import Path

from lib.errors import UserError

INDEX = "model_index.json"
INDICES = (INDEX, "config.json")
"""What says which model a folder holds: of a diffusers pipeline, of a transformers model."""
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")


def missing_files(folder: Path) -> list[str]:
    """Return what `folder` lacks to be a whole model, as paths relative to it; an empty list when it is.

    A model is a diffusers folder (`model_index.json` and a sub-folder per component) or, for captioning, a
    transformers folder (`config.json` naming an architecture). Weights must be safetensors, every shard
    of them that an index names. Reads the configurations only, no weights.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        index = _read(folder / INDEX)
        if index is None:
            return [f"{INDEX} (unreadable)"]
        parts = [
            name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0] is not None
        ]
        return [lack for part in parts for lack in _missing_in_component(folder, part)] or _no_parts(parts)
    if (config := _read(folder / "config.json")) and config.get("architectures"):
        return _missing_weights(folder, "")
    return [INDEX]


def find_model(folder: Path) -> Path | None:
    """Return the folder at or below `folder` that holds a model, the nearest first; None without one.

    Archives differ in how many folders they wrap around the model.
    """
    below = sorted(folder.rglob(INDEX), key=lambda path: (len(path.parts), path))
    if below:
        return below[0].parent
    return folder if (folder / "config.json").is_file() else None


def read_index(content: bytes, *, of: str) -> dict:
    """Return what a model_index.json says; `of` names the model. Raises UserError when it is none."""
    index = _parsed(content)
    if index is None:
        raise UserError(f"{of}: its {INDEX} is no JSON object; the model is damaged or was made by hand.")
    return index


def _no_parts(parts: list[str]) -> list[str]:
    return [] if parts else [f"{INDEX} (names no component)"]


def _read(path: Path) -> dict | None:
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


def _parsed(text: bytes) -> dict | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _missing_in_component(folder: Path, part: str) -> list[str]:
    for kind, config in (("scheduler", "scheduler_config.json"), ("tokenizer", "tokenizer_config.json")):
        if part.startswith(kind):
            return [] if (folder / part / config).is_file() else [f"{part}/{config}"]
    config = [] if (folder / part / "config.json").is_file() else [f"{part}/config.json"]
    return config + _missing_weights(folder / part, f"{part}/")


def _missing_weights(folder: Path, prefix: str) -> list[str]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    for index in indices:
        content = _read(index)
        if content is None or not isinstance(content.get("weight_map"), dict):
            return [f"{prefix}{index.name} (unreadable)"]
        return [
            f"{prefix}{name}"
            for name in sorted(set(content["weight_map"].values()))
            if not (folder / name).is_file()
        ]
    present = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if shards := [match for path in present if (match := SHARD.fullmatch(path.name))]:
        return [f"{prefix}{shards[0][1]}.safetensors.index.json"]
    if present:
        return []
    return [f"{prefix}*.safetensors"]
