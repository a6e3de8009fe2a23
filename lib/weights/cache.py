"""The cache folder, and whether a folder in it is complete, by the record of its download."""

import json
from pathlib import Path
from typing import Any

from lib import settings
from lib.models.layout import missing_files

RECORD = "download.json"


def cache_folder() -> Path:
    """Return where downloaded models are kept: `COGVIDEOX_CACHE`, by default ~/.cache/cogvideox."""
    return settings.current().cache


def is_complete(folder: Path) -> bool:
    """Return whether a folder has a model with all its files, those of its record at their sizes."""
    return folder.is_dir() and not missing_or_damaged(folder)


def missing_or_damaged(folder: Path) -> list[str]:
    """Return the files that are missing from a model folder, or whose size differs from its record."""
    record = _record(folder)
    if record is None:
        return missing_files(folder)
    damaged = [path for path, size in record["files"].items() if _size(folder / path) != size]
    return damaged or missing_files(folder / record["model"])


def model_folder(final: Path) -> Path:
    """Return where in a complete folder of the cache the model is: archives wrap folders around it."""
    record = _record(final)
    return final / record["model"] if record else final


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {**record, "model": str(record["model"]), "files": dict(record["files"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return {"model": ".", "files": {RECORD: -1}}  # damaged, so the other files cannot be checked


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
