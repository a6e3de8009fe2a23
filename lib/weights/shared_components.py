"""A converted model without text encoder, tokenizer or VAE, completed by links to those of downloaded ones.

All released CogVideoX models have the same T5-XXL of 9.5 GB, so conversion leaves it out; SAT keeps the VAE
in a file of its own. The completed folder is made of links alone and lives in the cache; nothing is copied,
and the converted one is not touched.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lib.errors import UserError
from lib.models.derive import family_of
from lib.models.layout import INDEX, missing_files
from lib.models.specs import ModelSpec

TEXT, VAE = ("text_encoder", "tokenizer"), "vae"
"""Components that no conversion of a transformer makes."""
BORROWED = (*TEXT, VAE)
PLACE = "completed"
"""In the cache."""


def can_be_completed(folder: Path) -> bool:
    """Whether a model's folder lacks exactly what a downloaded model can lend, and each of it wholly."""
    absent = [part for part in BORROWED if not (folder / part).exists()]
    lacks = missing_files(folder) if (folder / INDEX).is_file() else []
    return bool(absent) and bool(lacks) and all(lack.partition("/")[0] in absent for lack in lacks)


def completed(folder: Path, lenders: Iterable[Path], *, cache: Path) -> Path:
    """Return a folder of links to the model's components and to the lenders' for those it has not.

    `lenders` are whole models, the first that fits is taken. Raises UserError when none has a text encoder
    of the width that the transformer was made for, or none is of a kind with the same VAE.
    """
    lenders, parts, needs = list(lenders), {}, {}
    for wanted, fits, need in _loans(folder):
        lender = next((each for each in lenders if fits(each)), None)
        if lender is None:
            needs |= dict.fromkeys(wanted, need)
        else:
            parts |= {part: lender / part for part in wanted}
    if needs:
        raise _nothing_fits(folder, needs)
    parts |= {path.name: path for path in folder.iterdir() if path.is_dir() or path.name == INDEX}
    return _linked({name: path.resolve() for name, path in parts.items()}, folder.resolve(), cache)


def has_text_encoder(folder: Path, width: int | None) -> bool:
    """Whether a model's folder has a text encoder of this width, and its tokenizer."""
    found = _number(folder / "text_encoder" / "config.json", "d_model")
    return found is not None and found == width and (folder / "tokenizer").is_dir()


def _loans(folder: Path) -> Iterator[tuple[list[str], Callable[[Path], bool], str]]:
    """Components that come from one lender, who can lend them, and what that is in words."""
    config = folder / "transformer" / "config.json"
    if text := [part for part in TEXT if not (folder / part).exists()]:
        width = _number(config, "text_embed_dim")
        yield text, lambda lender: has_text_encoder(lender, width), f"a text encoder of width {width}"
    if not (folder / VAE).exists():
        family, channels = family_of(folder), _number(config, "out_channels")
        yield [VAE], lambda lender: _has_vae(lender, family, channels), f"a VAE of {family.name}'s kind"


def _nothing_fits(folder: Path, needs: dict[str, str]) -> UserError:
    model = family_of(folder).name if VAE in needs else "cogvideox-2b"
    included = {part: "its VAE" if part == VAE else "the text encoder" for part in needs}
    return UserError(
        f"{folder} has no {' and no '.join(needs)}, and no downloaded model has what fits its transformer "
        f"({', '.join(dict.fromkeys(needs.values()))}). Start once with a released model, for example "
        f"COGVIDEOX_MODEL={model}, which downloads one, or convert it with "
        f"{' and '.join(dict.fromkeys(included.values()))} included."
    )


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


def _has_vae(lender: Path, family: ModelSpec, channels: int | None) -> bool:
    """Whether it has the VAE of a family: the same tensors do for several, but for no other scaling."""
    try:
        other = family_of(lender)
    except UserError:
        return False  # a captioning model
    found = _number(lender / VAE / "config.json", "latent_channels")
    return found is not None and found == channels and _vae_facts(other) == _vae_facts(family)


def _vae_facts(spec: ModelSpec) -> tuple[object, ...]:
    return spec.frame_step, spec.scaling_factor, spec.invert_scale_latents


def _number(path: Path, key: str) -> int | None:
    try:
        value = json.loads(path.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None
