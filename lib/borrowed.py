"""A converted model without text encoder and tokenizer, completed by links to those of a downloaded one.

All released CogVideoX models have the same T5-XXL of 9.5 GB, so conversion leaves it out. The completed
folder is made of links alone and lives in the cache; nothing is copied, and the converted one is not touched.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lib.errors import UserError
from lib.layout import INDEX, missing_files

BORROWED = ("text_encoder", "tokenizer")
PLACE = "completed"
"""In the cache."""


def can_be_completed(folder: Path) -> bool:
    """Whether a model's folder lacks exactly what a downloaded model can lend, and each of it wholly."""
    absent = [part for part in BORROWED if not (folder / part).exists()]
    lacks = missing_files(folder) if (folder / INDEX).is_file() else []
    return bool(absent) and bool(lacks) and all(lack.partition("/")[0] in absent for lack in lacks)


def completed(folder: Path, lenders: Iterable[Path], *, cache: Path) -> Path:
    """Return a folder of links to the model's components and to the lender's for those it has not.

    `lenders` are whole models, the first that fits is taken. Raises UserError when none has a text encoder
    of the width that the transformer was made for.
    """
    absent = [part for part in BORROWED if not (folder / part).exists()]
    width = _number(folder / "transformer" / "config.json", "text_embed_dim")
    lender = next((each for each in lenders if _fits(each, width)), None)
    if lender is None:
        raise UserError(
            f"{folder} has no {' and no '.join(absent)}, and no downloaded model has what fits its "
            f"transformer (a text encoder of width {width}). Start once with a released model, for example "
            "COGVIDEOX_MODEL=cogvideox-2b, which downloads one, or convert it with the text encoder included."
        )
    parts = {part: lender / part for part in absent}
    parts |= {path.name: path for path in folder.iterdir() if path.is_dir() or path.name == INDEX}
    return _linked({name: path.resolve() for name, path in parts.items()}, folder.resolve(), cache)


def _linked(parts: dict[str, Path], folder: Path, cache: Path) -> Path:
    written = json.dumps({name: str(path) for name, path in sorted(parts.items())})
    key = hashlib.sha256(written.encode()).hexdigest()[:16]
    final = cache / PLACE / key / folder.name
    if final.is_dir() and not missing_files(final):
        return final
    partial = cache / PLACE / f"{key}.{os.getpid()}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / folder.name).mkdir(parents=True)
        for name, path in parts.items():
            (partial / folder.name / name).symlink_to(path)
        shutil.rmtree(final.parent, ignore_errors=True)
        try:
            os.replace(partial, final.parent)
        except OSError:  # another process was faster
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _fits(lender: Path, width: int | None) -> bool:
    found = _number(lender / "text_encoder" / "config.json", "d_model")
    return found is not None and found == width and (lender / "tokenizer").is_dir()


def _number(path: Path, key: str) -> int | None:
    try:
        value = json.loads(path.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None
