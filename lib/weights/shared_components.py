"""Complete a converted model that has no text encoder, tokenizer or VAE with links to those of a donor model.

All released CogVideoX models have the same T5-XXL of 9.5 GB, so conversion leaves it out; SAT keeps the VAE
in a file of its own. Donors are downloaded models. The completed folder, in the cache, consists of links;
nothing is copied, and the converted model is not changed.
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
SHARED_COMPONENTS = (*TEXT, VAE)
"""Components that the conversion of a transformer does not make."""
COMPLETED = "completed"
"""Folder of the cache."""


def can_be_completed(folder: Path) -> bool:
    """Return whether shared components are all that a model's folder needs, none of them present in part."""
    absent = [name for name in SHARED_COMPONENTS if not (folder / name).exists()]
    missing = missing_files(folder) if (folder / INDEX).is_file() else []
    return bool(absent) and bool(missing) and all(path.partition("/")[0] in absent for path in missing)


def complete(folder: Path, donors: Iterable[Path], *, cache: Path) -> Path:
    """Return a folder of links to the model's own components and to a donor's for those it does not have.

    `donors` are complete models; the first that fits is used. Raises UserError when none has a text encoder
    of the width that the transformer was made for, or none has the VAE of its family.
    """
    donors, components, needs = list(donors), {}, {}
    for names, fits, need in _requirements(folder):
        donor = next((each for each in donors if fits(each)), None)
        if donor is None:
            needs |= dict.fromkeys(names, need)
        else:
            components |= {name: donor / name for name in names}
    if needs:
        raise _no_donor(folder, needs)
    components |= {path.name: path for path in folder.iterdir() if path.is_dir() or path.name == INDEX}
    return _link({name: path.resolve() for name, path in components.items()}, folder.resolve(), cache)


def has_text_encoder(folder: Path, width: int | None) -> bool:
    """Return whether a model's folder has a text encoder of this width, and its tokenizer."""
    found = _number(folder / "text_encoder" / "config.json", "d_model")
    return found is not None and found == width and (folder / "tokenizer").is_dir()


def _requirements(folder: Path) -> Iterator[tuple[list[str], Callable[[Path], bool], str]]:
    """Yield components that must come from one donor, whether a donor fits, and that in words."""
    config = folder / "transformer" / "config.json"
    if text := [name for name in TEXT if not (folder / name).exists()]:
        width = _number(config, "text_embed_dim")
        yield text, lambda donor: has_text_encoder(donor, width), f"a text encoder of width {width}"
    if not (folder / VAE).exists():
        family, channels = family_of(folder), _number(config, "out_channels")
        yield [VAE], lambda donor: _has_vae(donor, family, channels), f"the VAE of {family.name}"


def _no_donor(folder: Path, needs: dict[str, str]) -> UserError:
    model = family_of(folder).name if VAE in needs else "cogvideox-2b"
    included = dict.fromkeys("its VAE" if name == VAE else "the text encoder" for name in needs)
    return UserError(
        f"{folder} has no {' and no '.join(needs)}, and no downloaded model has what its transformer needs "
        f"({', '.join(dict.fromkeys(needs.values()))}). Start once with a released model, for example "
        f"COGVIDEOX_MODEL={model}, which downloads it, or convert the model with {' and '.join(included)} "
        "included."
    )


def _link(components: dict[str, Path], folder: Path, cache: Path) -> Path:
    written = json.dumps({name: str(path) for name, path in sorted(components.items())})
    key = hashlib.sha256(written.encode()).hexdigest()[:16]
    final = cache / COMPLETED / key / folder.name
    if final.is_dir() and not missing_files(final):
        return final
    partial = cache / COMPLETED / f"{key}.{os.getpid()}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / folder.name).mkdir(parents=True)
        for name, path in components.items():
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


def _has_vae(donor: Path, family: ModelSpec, channels: int | None) -> bool:
    """Return whether a donor has the VAE of a family: the same tensors and the same scaling of latents."""
    try:
        other = family_of(donor)
    except UserError:
        return False  # a captioning model
    found = _number(donor / VAE / "config.json", "latent_channels")
    return found is not None and found == channels and _vae_facts(other) == _vae_facts(family)


def _vae_facts(spec: ModelSpec) -> tuple[object, ...]:
    return spec.frame_step, spec.scaling_factor, spec.invert_scale_latents


def _number(path: Path, key: str) -> int | None:
    try:
        value = json.loads(path.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None
