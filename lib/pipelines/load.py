"""A ready diffusers pipeline for a spec, a folder and this machine."""

from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from lib.models.specs import ModelSpec
from lib.pipelines import attention
from lib.pipelines.acceleration import PLAIN, Acceleration, set_attention_backend
from lib.pipelines.compilation import compile_blocks, keep_compilations
from lib.pipelines.components import load_components
from lib.pipelines.library_logs import silence_libraries
from lib.pipelines.machine import Machine
from lib.pipelines.offload import place
from lib.pipelines.quantization import quantize_pipeline
from lib.settings import Offload


def load_pipeline(
    spec: ModelSpec,
    folder: Path,
    machine: Machine,
    *,
    offload: Offload = "resident",
    text_encoder: bool = True,
    acceleration: Acceleration = PLAIN,
) -> DiffusionPipeline:
    """Load a folder without touching the network and place its components as `offload` says.

    Without its text encoder the pipeline takes embeddings only.
    """
    silence_libraries()
    if acceleration.compiled:
        keep_compilations()
    on_device = offload in ("resident", "text")
    quantized = acceleration.quantization != "none"
    parts = load_components(
        folder,
        dtype=getattr(torch, machine.dtype),
        # What will be quantized may not fit on the device before.
        device=machine.device if on_device and not quantized else "cpu",
        text_encoder=text_encoder,
    )
    pipeline: DiffusionPipeline = getattr(diffusers, spec.pipeline_class)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    _allow_portraits(pipeline)
    attention.install(pipeline.transformer)
    if quantized:
        quantize_pipeline(pipeline, acceleration.quantization, device=machine.device if on_device else "cpu")
    set_attention_backend(pipeline.transformer, acceleration.attention)
    if acceleration.compiled:
        compile_blocks(pipeline.transformer)
    place(pipeline, offload, device=machine.device)
    return pipeline


def _allow_portraits(pipeline: DiffusionPipeline) -> None:
    """Let CogVideoX1.5 make portraits.

    diffusers cuts its positions out of a grid as large as the configured sample, 96x170 in some copies. A
    larger grid starts with the same positions, and the weights do not depend on its size.
    """
    config = pipeline.transformer.config
    if config.get("patch_size_t") is not None:
        side = max(config.sample_height, config.sample_width)
        pipeline.transformer.register_to_config(sample_height=side, sample_width=side)
