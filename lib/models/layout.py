"""The files of a model folder: which are required, and which are missing."""

import json
import re
from pathlib import Path

from lib.errors import UserError

INDEX = "model_index.json"
INDICES = (INDEX, "config.json")
"""The file that identifies a diffusers pipeline, and the one that identifies a transformers model."""
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
CONFIG_ONLY = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
"""Components without weights -> their configuration."""


def missing_files(folder: Path) -> list[str]:
    """Return the files that a model folder needs and does not have, as paths relative to it.

    A model is a diffusers folder (`model_index.json` and a sub-folder per component) or, for captioning, a
    transformers folder (`config.json` with an architecture). Weights must be safetensors, with every shard
    that an index names. Reads configurations only, no weights.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        index = _read(folder / INDEX)
        if index is None:
            return [f"{INDEX} (unreadable)"]
        components = [
            name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0] is not None
        ]
        if not components:
            return [f"{INDEX} (names no component)"]
        return [path for name in components for path in _missing_in_component(folder, name)]
    if (config := _read(folder / "config.json")) and config.get("architectures"):
        return _missing_weights(folder, "")
    return [INDEX]


def find_model(folder: Path) -> Path | None:
    """Return the folder at or below `folder` that holds a model, the nearest first; None without one.

    Archives differ in how many folders they wrap around a model.
    """
    below = sorted(folder.rglob(INDEX), key=lambda path: (len(path.parts), path))
    if below:
        return below[0].parent
    return folder if (folder / "config.json").is_file() else None


def read_index(content: bytes, *, of: str) -> dict:
    """Parse a model_index.json; `of` names the model. Raises UserError when it is not a JSON object."""
    index = _parse(content)
    if index is None:
        raise UserError(f"{of}: {INDEX} is not a JSON object; the model is damaged or was made by hand.")
    return index


def _read(path: Path) -> dict | None:
    try:
        return _parse(path.read_bytes())
    except OSError:
        return None


def _parse(text: bytes) -> dict | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _missing_in_component(folder: Path, name: str) -> list[str]:
    for kind, config in CONFIG_ONLY.items():
        if name.startswith(kind):
            return [] if (folder / name / config).is_file() else [f"{name}/{config}"]
    config = [] if (folder / name / "config.json").is_file() else [f"{name}/config.json"]
    return config + _missing_weights(folder / name, f"{name}/")


def _missing_weights(folder: Path, prefix: str) -> list[str]:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        content = _read(index)
        if content is None or not isinstance(content.get("weight_map"), dict):
            return [f"{prefix}{index.name} (unreadable)"]
        shards = sorted(set(content["weight_map"].values()))
        return [f"{prefix}{name}" for name in shards if not (folder / name).is_file()]
    present = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if shards := [match for path in present if (match := SHARD.fullmatch(path.name))]:
        return [f"{prefix}{shards[0][1]}.safetensors.index.json"]
    return [] if present else [f"{prefix}*.safetensors"]
