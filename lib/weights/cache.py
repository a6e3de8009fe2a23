"""The cache, and whether a folder in it is whole: by the record of its download and its components' files."""

import json
import os
from pathlib import Path

from lib.models.layout import missing_files

RECORD = "download.json"


def cache_folder() -> Path:
    """Return where downloaded models are kept: `COGVIDEOX_CACHE`, by default ~/.cache/cogvideox."""
    return Path(os.environ.get("COGVIDEOX_CACHE") or "~/.cache/cogvideox").expanduser()


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds a whole model: recorded files at their sizes, every component's files."""
    return folder.is_dir() and not lacks(folder)


def lacks(folder: Path) -> list[str]:
    """Return the files that keep a folder from being whole, as paths; an empty list when it is."""
    record = _record(folder)
    if record is None:
        return missing_files(folder)
    lost = [path for path, size in record["files"].items() if _size(folder / path) != size]
    return lost or missing_files(folder / record["model"])


def model_folder(final: Path) -> Path:
    """Return where in a whole folder of the cache the model is: archives wrap folders around it."""
    record = _record(final)
    return final / record["model"] if record else final


def _record(folder: Path) -> dict | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {**record, "model": str(record["model"]), "files": dict(record["files"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return {"model": ".", "files": {RECORD: -1}}  # damaged: nothing vouches for the other files


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
