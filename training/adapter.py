"""The LoRA on the transformer: added, kept in float32, and saved so that diffusers can load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.errors import UserError, shown
from lib.lora.file import RECORD, read_header
from lib.lora.keys import recorded_facts
from lib.storage.disk import replacing

ADAPTER = "default"
PREFIX = "transformer."
DIFFUSERS_METADATA = "lora_adapter_metadata"
"""Where diffusers looks for rank and alpha in a file's metadata."""
WRITTEN = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "lora_dropout",
    "init_lora_weights",
)
"""What is written of peft's configuration: diffusers passes it to peft, and an older peft knows no more."""


def add_adapter(
    transformer: CogVideoXTransformer3DModel, *, rank: int, alpha: float, targets: list[str]
) -> list[torch.nn.Parameter]:
    """Freeze the transformer, add LoRA matrices to its target layers, and return them as float32 parameters.

    B starts at zero, so that the model starts as the base. Raises UserError when no linear layer has such a
    name.
    """
    check_targets(transformer, targets)
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # peft scales by fractions too
        init_lora_weights=True,
        target_modules=targets,
    )
    transformer.add_adapter(config, adapter_name=ADAPTER)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def check_targets(transformer: CogVideoXTransformer3DModel, targets: list[str]) -> None:
    """Raise UserError unless every target is the end of a linear layer's name."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({_name_in_block(name) for name in linear})
            raise UserError(
                f"target_modules: no linear layer is called {shown(target)}; there are {', '.join(known)}."
            )


def adapter_weights(transformer: CogVideoXTransformer3DModel) -> dict[str, torch.Tensor]:
    """Return the LoRA matrices by diffusers' names, on the CPU."""
    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()}


def save_adapter(
    transformer: CogVideoXTransformer3DModel, path: Path, facts: Mapping[str, Any], *, dtype: torch.dtype
) -> None:
    """Write lora.safetensors in one step, with `facts` in its metadata.

    Rank and alpha are in the metadata too, where diffusers reads them and scales by alpha / rank. Raises
    UserError when the file cannot be written.
    """
    config = transformer.peft_config[ADAPTER].to_dict()
    packed = {f"{PREFIX}{key}": sorted(v) if isinstance(v := config[key], set) else v for key in WRITTEN}
    metadata = {
        "format": "pt",
        DIFFUSERS_METADATA: json.dumps(packed, indent=2, sort_keys=True, default=str),
        RECORD: json.dumps(dict(facts), sort_keys=True),
    }
    weights = {name: value.to(dtype) for name, value in adapter_weights(transformer).items()}
    try:
        with replacing(path) as partial:
            save_tensors(weights, partial, metadata=metadata)
    except SafetensorError as error:
        raise UserError(f"{path} could not be written: {error}.") from error


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the mode of other new files; save_file's only their owner may read.

    The same tensors and metadata give the same bytes: save_file writes metadata in any order.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    _sort_metadata(path)
    path.chmod(mode)


def _sort_metadata(path: Path) -> None:
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:  # would overwrite the tensors
            raise RuntimeError(f"{path.name}: the header has {size} bytes, but {len(text)} in sorted order.")
        file.seek(8)
        file.write(text)


def check_adapter(path: Path, *, base: str, rank: int, alpha: float) -> None:
    """Raise UserError when a file records another base, rank or alpha than those of this run."""
    try:
        recorded = recorded_facts(read_header(path, name=path.name).metadata)
    except OSError as error:
        raise UserError(f"{path.name} to resume from cannot be read: {error}.") from error
    differing = [
        f"{name} (it has {recorded[name]}, this run {value})"
        for name, value in {"base": base, "rank": rank, "alpha": alpha}.items()
        if name in recorded and recorded[name] != value
    ]
    if differing:
        raise UserError(f"{path.name} to resume from does not fit: {', '.join(differing)}.")


def load_adapter(transformer: CogVideoXTransformer3DModel, path: Path) -> None:
    """Fill the LoRA matrices from a file that `save_adapter` wrote. Raises UserError when it does not fit."""
    try:
        stored = {name.removeprefix(PREFIX): value.float() for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} of the checkpoint cannot be read: {error}.") from error
    expected = {
        name.removeprefix(PREFIX): value.shape for name, value in adapter_weights(transformer).items()
    }
    if {name: value.shape for name, value in stored.items()} != expected:
        raise UserError(
            f"{path.name} of the checkpoint has another LoRA ({len(stored)} matrices) than this run trains "
            f"({len(expected)}): use the base, rank and target_modules that it was made with."
        )
    set_peft_model_state_dict(transformer, stored, adapter_name=ADAPTER)


def _name_in_block(name: str) -> str:
    """Return `to_out.0` for `transformer_blocks.3.attn1.to_out.0`: the layer's name in target_modules."""
    _, in_attention, layer = name.rpartition("attn1.")
    if in_attention:
        return layer
    _, in_feed_forward, layer = name.rpartition(".ff.")
    if in_feed_forward:
        return f"ff.{layer}"
    return ".".join(part for part in name.split(".") if not part.isdigit() and part != "transformer_blocks")
