"""The frozen transformer that a LoRA is trained on, loaded for this machine."""

from typing import TYPE_CHECKING

import torch

from training.objective import project_in_float32
from training.plan import Plan

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel


def load_transformer(plan: Plan) -> "CogVideoXTransformer3DModel":
    """The base's transformer on the device, in the plan's type."""
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(
        plan.folder / "transformer", dtype=getattr(torch, plan.dtype), local_files_only=True
    ).to(plan.device)
    if plan.device == "cpu" and plan.precision != "no":
        project_in_float32(transformer.patch_embed.proj)
    return transformer


def store_in_fp8(transformer: "CogVideoXTransformer3DModel", dtype: torch.dtype) -> None:
    """Keep the frozen linear layers in 8 bits; each computes in `dtype`. Norms, embeddings and LoRA stay."""
    from diffusers.hooks import apply_layerwise_casting
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    apply_layerwise_casting(
        transformer, torch.float8_e4m3fn, dtype, skip_modules_pattern=(*DEFAULT_SKIP_MODULES_PATTERN, "lora_")
    )
