"""Derive a ModelSpec from a folder's own configs, for models that lib/models/specs.py does not list."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lib.errors import UserError
from lib.models.specs import MODEL_CLASSES, SPECS, ModelSpec, SizeRule, Task

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
FIRST, SECOND, CAPTION = "cogvideox-5b", "cogvideox1.5-5b", "cogvlm2-caption"
"""The models of the table whose values hold where a folder's configs are silent."""


def task_of(index: dict, place: object) -> Task:
    """What the model of a model_index.json or config.json does. Raises UserError when it is none of these."""
    names = [index.get("_class_name"), *(index.get("architectures") or [])]
    task = next((MODEL_CLASSES[name] for name in names if name in MODEL_CLASSES), None)
    if task is None:
        found = ", ".join(repr(name) for name in names if name) or "model of unknown kind"
        raise UserError(f"{place} holds a {found}; allowed are {', '.join(MODEL_CLASSES)}.")
    return task


def spec_for(name: str, folder: Path) -> ModelSpec:
    """The spec of a known name, else one derived from the configs in a model's folder.

    Raises UserError when the folder holds neither a CogVideoX pipeline nor a captioning model.
    """
    return SPECS.get(name) or derive_spec(folder)


def derive_spec(folder: Path) -> ModelSpec:
    """Read a ModelSpec from model_index.json, transformer/config.json and vae/config.json.

    Where the configs are silent (frame rate, longest clip) the family's values hold: a transformer with
    patch_size_t is of the 1.5 family. Of a captioning model config.json alone is read. Raises UserError for
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
    second = temporal_patch is not None
    family = SPECS[SECOND if second else FIRST]
    height, width = transformer["sample_height"] * ratio, transformer["sample_width"] * ratio
    if second and height == width:  # some copies of 1.5 carry a nominal square of 300x300 latents
        height, width = family.height, family.width
    size_rule: SizeRule = "trained"
    if transformer.get("use_learned_positional_embeddings"):
        size_rule = "fixed"
    elif second and task == "i2v":
        size_rule = "short side"
    step = vae["temporal_compression_ratio"] * 2 * (temporal_patch or 1)
    steps = max(1, (transformer["sample_frames"] - 1) // step)
    return ModelSpec(
        name=folder.name,
        task=task,
        height=height,
        width=width,
        frames=steps * step + 1,  # a length that the rule allows, also where the trained one is none
        frame_step=step,
        max_frames=family.max_frames if second else max(family.max_frames, transformer["sample_frames"]),
        fps=family.fps,
        text_tokens=transformer["max_text_seq_length"],
        dtype=weights_dtype(folder / "transformer"),
        size_rule=size_rule,
        size_step=ratio * transformer["patch_size"],
    )


def family_of(folder: Path) -> ModelSpec:
    """The released model of whose kind a folder's transformer is: it tells which VAE the transformer needs.

    Raises UserError when model_index.json or the transformer's config is missing, or of another model.
    """
    task = task_of(read_config(folder / "model_index.json"), folder)
    transformer = read_config(folder / "transformer" / "config.json")
    second = transformer.get("patch_size_t") is not None
    if not second and not transformer.get("use_rotary_positional_embeddings"):
        return SPECS["cogvideox-2b"]
    return SPECS[(SECOND if second else FIRST) + ("-i2v" if task == "i2v" else "")]


def _derive_caption_spec(folder: Path) -> ModelSpec:
    config = read_config(folder / "config.json", "vision_config")
    task = task_of(config, folder)
    size, patch = (config["vision_config"].get(name, 0) for name in ("image_size", "patch_size"))
    return replace(
        SPECS[CAPTION], name=folder.name, task=task, height=size, width=size, dtype=weights_dtype(folder),
        size_step=patch, repository=None,
    )  # fmt: skip


def read_config(path: Path, required: str = "") -> dict:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not a whole diffusers folder.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    missing = [key for key in required.split() if key not in config]
    if missing:
        raise UserError(f"{path} is no CogVideoX configuration: it lacks {', '.join(missing)}.")
    return config


def weights_dtype(folder: Path) -> Literal["float16", "bfloat16", "float32"]:
    """The floating point type that most tensors of a safetensors folder are stored in."""
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        except (struct.error, ValueError):
            raise UserError(f"{path} is no whole safetensors file.") from None
        kinds = [names[t["dtype"]] for k, t in header.items() if k != "__metadata__" and t["dtype"] in names]
        if kinds:
            return max(set(kinds), key=kinds.count)
    return "float32"
