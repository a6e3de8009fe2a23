"""Loading a CaptionModel from the layout of the released checkpoint.

Tensors are read one at a time straight to their device, so loading needs no second copy of the weights.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open

from lib.caption.config import read_config
from lib.caption.language import RotaryEmbedding
from lib.caption.model import CaptionModel
from lib.caption.precision import Quantization, set_quantized
from lib.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHOWN = 5
"""How many keys an error lists."""
LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "post_attention_layernorm.weight": ("post_attention_layernorm.weight",),
    "self_attn.language_expert_query_key_value.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attn.language_expert_dense.weight": ("self_attn.o_proj.weight",),
    "mlp.language_mlp.gate_proj.weight": ("mlp.gate_proj.weight",),
    "mlp.language_mlp.up_proj.weight": ("mlp.up_proj.weight",),
    "mlp.language_mlp.down_proj.weight": ("mlp.down_proj.weight",),
}
"""Released name -> our names in a layer of the language model; several are concatenated along dim 0."""
OTHER_NAMES = {
    "model.embed_tokens.weight": "language.model.embed_tokens.weight",
    "model.norm.weight": "language.model.norm.weight",
    "lm_head.weight": "language.lm_head.weight",
}
INV_FREQ = "self_attn.rotary_emb.inv_freq"
"""A buffer that is the same in every layer of a checkpoint; a CaptionModel has it once."""
OUR_INV_FREQ = "language.model.rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor in a checkpoint: the parameters concatenated in it, the rows of each, and its shape."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]


def entries(model: CaptionModel) -> dict[str, Entry]:
    """Return every tensor that a checkpoint of this model has, by its released key."""
    named: dict[str, tuple[str, ...]] = {released: (ours,) for released, ours in OTHER_NAMES.items()}
    for layer in range(model.config.num_hidden_layers):
        for released, ours in LAYER_NAMES.items():
            names = tuple(f"language.model.layers.{layer}.{name}" for name in ours)
            named[f"model.layers.{layer}.{released}"] = names
        named[f"model.layers.{layer}.{INV_FREQ}"] = (OUR_INV_FREQ,)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    named |= {f"model.{name}": (name,) for name in shapes if name.startswith("vision.")}
    found = {}
    for released, names in named.items():
        rows = tuple(shapes[name][0] for name in names)
        found[released] = Entry(names=names, rows=rows, shape=(sum(rows), *shapes[names[0]][1:]))
    return found


def load_model(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    quantization: Quantization = "none",
) -> CaptionModel:
    """Load the model in a folder for inference.

    Raises UserError naming the tensor for a checkpoint with a missing, an unknown or a wrongly shaped one.
    """
    with torch.device("meta"):
        model = CaptionModel(read_config(folder)).requires_grad_(False).eval()
    wanted, files = entries(model), _files(folder)
    _check_keys(wanted, files, folder)
    for key, tensor in _tensors(folder, files, str(device)):
        entry = wanted[key]
        if tuple(tensor.shape) != entry.shape or not tensor.is_floating_point():
            raise UserError(
                f"{folder.name}: {key} is {tensor.dtype} {list(tensor.shape)}; "
                f"according to config.json it should be a float tensor {list(entry.shape)}."
            )
        for name, part in zip(entry.names, tensor.to(dtype).split(entry.rows), strict=True):
            if name == OUR_INV_FREQ:
                _set_inv_freq(model, part, key)
            elif not set_quantized(model, name, part, quantization):
                _set(model, name, part)
    return model


def _files(folder: Path) -> dict[str, str]:
    """Return the name of the file with each key."""
    try:
        if (folder / INDEX).is_file():
            found = json.loads((folder / INDEX).read_bytes())["weight_map"]
            names = sorted(set(found.values()))
        else:
            names = [SINGLE]
        files: dict[str, str] = {}
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder.name}: the weights cannot be read: {error}") from error
    return files


def _check_keys(wanted: dict[str, Entry], files: dict[str, str], folder: Path) -> None:
    faults = []
    for what, keys in (
        ("is missing", [key for key in wanted if key not in files]),
        ("has unknown", [key for key in files if key not in wanted]),
    ):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            faults.append(f"{what} {', '.join(keys[:SHOWN])}{more}")
    if faults:
        raise UserError(
            f"{folder.name} is not a complete CogVLM2-Caption checkpoint: it {' and it '.join(faults)}."
        )


def _tensors(folder: Path, files: dict[str, str], device: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in sorted(set(files.values())):
        with safe_open(folder / name, framework="pt", device=device) as file:
            for key in (key for key, file_name in files.items() if file_name == name):
                yield key, file.get_tensor(key)


def _set(model: CaptionModel, name: str, tensor: torch.Tensor) -> None:
    module, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(module), parameter, torch.nn.Parameter(tensor, requires_grad=False))


def _set_inv_freq(model: CaptionModel, frequencies: torch.Tensor, key: str) -> None:
    rotary = cast(RotaryEmbedding, model.language.model.rotary_emb)
    if rotary.inv_freq.is_meta:
        rotary.inv_freq = frequencies
    elif not torch.equal(rotary.inv_freq, frequencies):
        raise UserError(f"{key} differs between layers; in a CogVLM2-Caption it is the same in all of them.")
