"""Derive a ModelSpec from a folder's own configs, for models that lib/models/specs.py does not list."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lib.errors import UserError
from lib.models.specs import MODEL_CLASSES, SPECS, ModelSpec, SizeRule, Task
from lib.settings import Dtype

COGVIDEOX, COGVIDEOX_15, CAPTION = "cogvideox-5b", "cogvideox1.5-5b", "cogvlm2-caption"
"""The known models whose values are used where a folder's configs say nothing."""


def task_of(index: dict, place: object) -> Task:
    """Return the task of the model with this model_index.json or config.json.

    `place` names the model. Raises UserError for a model of another kind.
    """
    names = [index.get("_class_name"), *(index.get("architectures") or [])]
    for name in names:
        if name in MODEL_CLASSES:
            return MODEL_CLASSES[name]
    found = ", ".join(repr(name) for name in names if name) or "model of unknown kind"
    raise UserError(f"{place} holds a {found}; allowed are {', '.join(MODEL_CLASSES)}.")


def spec_for(name: str, folder: Path) -> ModelSpec:
    """Return the spec of a known name, else one derived from the configs in a model's folder.

    Raises UserError when the folder holds neither a CogVideoX pipeline nor a captioning model.
    """
    return SPECS.get(name) or derive_spec(folder)


def derive_spec(folder: Path) -> ModelSpec:
    """Derive a ModelSpec from model_index.json, transformer/config.json and vae/config.json.

    What the configs do not say (frame rate, longest clip) is taken from the family: a transformer with
    patch_size_t belongs to 1.5. For a captioning model only config.json is read. Raises UserError for
    anything else.
    """
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        return _derive_caption_spec(folder)
    task = task_of(read_config(folder / "model_index.json"), folder)
    transformer = read_config(
        folder / "transformer" / "config.json",
        "sample_height sample_width sample_frames patch_size max_text_seq_length",
    )
    vae = read_config(folder / "vae" / "config.json", "block_out_channels temporal_compression_ratio")
    temporal_patch = transformer.get("patch_size_t")
    ratio = 2 ** (len(vae["block_out_channels"]) - 1)
    is_15 = temporal_patch is not None
    family = SPECS[COGVIDEOX_15 if is_15 else COGVIDEOX]
    height, width = transformer["sample_height"] * ratio, transformer["sample_width"] * ratio
    if is_15 and height == width:  # some copies of 1.5 have a nominal 300x300 latents
        height, width = family.height, family.width
    size_rule: SizeRule = "trained"
    if transformer.get("use_learned_positional_embeddings"):
        size_rule = "fixed"
    elif is_15 and task == "i2v":
        size_rule = "short side"
    step = vae["temporal_compression_ratio"] * 2 * (temporal_patch or 1)
    steps = max(1, (transformer["sample_frames"] - 1) // step)
    return ModelSpec(
        name=folder.name,
        task=task,
        height=height,
        width=width,
        frames=steps * step + 1,  # valid even if the trained length is not
        frame_step=step,
        max_frames=family.max_frames if is_15 else max(family.max_frames, transformer["sample_frames"]),
        fps=family.fps,
        text_tokens=transformer["max_text_seq_length"],
        dtype=weights_dtype(folder / "transformer"),
        size_rule=size_rule,
        size_step=ratio * transformer["patch_size"],
    )


def family_of(folder: Path) -> ModelSpec:
    """Return the spec of the released model that a transformer is a variant of, which decides its VAE.

    Raises UserError when model_index.json or the transformer's config is missing, or of another model.
    """
    task = task_of(read_config(folder / "model_index.json"), folder)
    transformer = read_config(folder / "transformer" / "config.json")
    is_15 = transformer.get("patch_size_t") is not None
    if not is_15 and not transformer.get("use_rotary_positional_embeddings"):
        return SPECS["cogvideox-2b"]
    return SPECS[(COGVIDEOX_15 if is_15 else COGVIDEOX) + ("-i2v" if task == "i2v" else "")]


def _derive_caption_spec(folder: Path) -> ModelSpec:
    config = read_config(folder / "config.json", "vision_config")
    task = task_of(config, folder)
    size, patch = (config["vision_config"].get(name, 0) for name in ("image_size", "patch_size"))
    return replace(
        SPECS[CAPTION], name=folder.name, task=task, height=size, width=size, dtype=weights_dtype(folder),
        size_step=patch, repository=None,
    )  # fmt: skip


def read_config(path: Path, required: str = "") -> dict:
    """Read a JSON configuration; `required` lists keys, separated by blanks. Raises UserError."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a complete diffusers folder.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    missing = [key for key in required.split() if key not in config]
    if missing:
        raise UserError(f"{path} is not a CogVideoX configuration; missing: {', '.join(missing)}.")
    return config


def weights_dtype(folder: Path) -> Dtype:
    """Return the floating point type in which most tensors of a safetensors folder are stored."""
    names: dict[str, Dtype] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                dtypes = [file.get_slice(key).get_dtype() for key in file.keys()]  # noqa: SIM118
        except SafetensorError:
            raise UserError(f"{path} is not a complete safetensors file.") from None
        known: Counter[Dtype] = Counter(names[dtype] for dtype in dtypes if dtype in names)
        if known:
            return known.most_common(1)[0][0]
    return "float32"
