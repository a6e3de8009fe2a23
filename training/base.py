"""The frozen transformer that a LoRA is trained on, loaded for this machine."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.objective import project_in_float32
from training.plan import Plan

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel

KEPT = ("patch_embed", "time_embedding", "ofs_embedding", "norm", "^proj_out$", "lora_")
"""Modules that fp8 leaves as they are, by patterns of their names: small, and felt by every block."""


def load_transformer(plan: Plan) -> "CogVideoXTransformer3DModel":
    """The base's transformer on the device, in the plan's type."""
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(
        plan.folder / "transformer",
        dtype=getattr(torch, plan.dtype),
        local_files_only=True,
        use_safetensors=True,
    ).to(plan.device)
    if plan.device == "cpu" and plan.precision != "no":
        project_in_float32(transformer.patch_embed.proj)
    return transformer


def skeleton(folder: Path) -> "CogVideoXTransformer3DModel":
    """The transformer of a diffusers folder without its weights, for its modules' names."""
    from diffusers import CogVideoXTransformer3DModel

    config = CogVideoXTransformer3DModel.load_config(folder / "transformer", local_files_only=True)
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(config)


def store_in_fp8(transformer: "CogVideoXTransformer3DModel", dtype: torch.dtype) -> None:
    """Keep the blocks' frozen linear layers in 8 bits; each computes in `dtype`."""
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(transformer, torch.float8_e4m3fn, dtype, skip_modules_pattern=KEPT)
