"""The frozen base's components, loaded from its folder for training."""

from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.hooks import apply_layerwise_casting
from transformers import AutoTokenizer, T5EncoderModel

from lib.models.derive import read_config
from training.objective import project_in_float32
from training.plan import Plan

Model = TypeVar("Model", bound=torch.nn.Module)
KEPT_IN_FULL = ("patch_embed", "time_embedding", "ofs_embedding", "norm", "^proj_out$", "lora_")
"""Modules that fp8 storage leaves alone, by patterns of their names: small, and read by every block."""


def load_transformer(plan: Plan) -> CogVideoXTransformer3DModel:
    """Load the transformer on the device, in the plan's type."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(
        plan.folder / "transformer", dtype=plan.dtype, local_files_only=True, use_safetensors=True
    )
    _frozen(transformer, plan)
    if plan.device == "cpu" and plan.precision != "no":
        project_in_float32(transformer.patch_embed.proj)
    return transformer


def store_in_fp8(transformer: CogVideoXTransformer3DModel, dtype: torch.dtype) -> None:
    """Store the blocks' frozen linear layers in 8 bits; each computes in `dtype`."""
    apply_layerwise_casting(transformer, torch.float8_e4m3fn, dtype, skip_modules_pattern=KEPT_IN_FULL)


def transformer_without_weights(folder: Path) -> CogVideoXTransformer3DModel:
    """Build a folder's transformer on the meta device, for its modules' names."""
    config: Any = CogVideoXTransformer3DModel.load_config(folder / "transformer", local_files_only=True)
    with torch.device("meta"):
        transformer: Any = CogVideoXTransformer3DModel.from_config(config)
    return transformer


def load_vae(plan: Plan, *, tiling: bool, slicing: bool = False) -> AutoencoderKLCogVideoX:
    """Load the VAE, frozen."""
    vae = AutoencoderKLCogVideoX.from_pretrained(
        plan.folder / "vae", dtype=plan.dtype, local_files_only=True, use_safetensors=True
    )
    _frozen(vae, plan)
    if tiling:
        vae.enable_tiling()
    if slicing:
        vae.enable_slicing()
    return vae


def load_text_encoder(plan: Plan) -> tuple[Any, T5EncoderModel]:
    """Load the tokenizer and the T5 encoder, frozen."""
    tokenizer = AutoTokenizer.from_pretrained(plan.folder / "tokenizer", local_files_only=True)
    encoder = T5EncoderModel.from_pretrained(
        plan.folder / "text_encoder", dtype=plan.dtype, local_files_only=True, use_safetensors=True
    )
    return tokenizer, _frozen(encoder, plan)


def load_scheduler(folder: Path) -> Any:
    """Load a checkpoint's scheduler, of the class that it names."""
    name = read_config(folder / "scheduler" / "scheduler_config.json", "_class_name")["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler", local_files_only=True)


def scaling_factor(folder: Path) -> float:
    """Return the factor of a checkpoint's latents."""
    return read_config(folder / "vae" / "config.json", "scaling_factor")["scaling_factor"]


def _frozen(model: Model, plan: Plan) -> Model:
    model.to(plan.device)
    model.eval().requires_grad_(False)
    return model
