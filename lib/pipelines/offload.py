"""Placing a pipeline's components as a memory plan says, and again after their layers have changed.

place(pipeline, "text", device="cuda")
offload_text_encoder(pipeline)     # after prompts are encoded
with unhooked(pipeline, "model"):
    ...                            # add or remove layers
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

from lib.settings import Offload


def place(pipeline: DiffusionPipeline, offload: Offload, *, device: str) -> None:
    """Move what stays to `device`, and have the rest moved there when it is used.

    All plans but resident keep the other weights in system memory.
    """
    if offload == "resident":
        pipeline.to(device)
    elif offload == "text":
        pipeline.transformer.to(device)
        pipeline.vae.to(device)
        if pipeline.text_encoder is not None:
            cpu_offload_with_hook(pipeline.text_encoder, device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        _offload_groups(pipeline, device)
    else:
        _offload_layers(pipeline, device)


def offload_text_encoder(pipeline: DiffusionPipeline) -> None:
    """Move the text encoder back to system memory, where the plan moved all of it to the GPU for a prompt."""
    if isinstance(getattr(pipeline.text_encoder, "_hf_hook", None), CpuOffload):
        pipeline.text_encoder.to("cpu")


@contextmanager
def unhooked(pipeline: DiffusionPipeline, offload: Offload) -> Iterator[None]:
    """Allow the transformer's layers to be replaced inside the block.

    Offloading keeps copies of what it moves, or the layers themselves: without this a removed LoRA would
    stay in memory, and a new one would never be moved.
    """
    device = str(pipeline._execution_device)
    if offload in ("model", "sequential"):
        pipeline.remove_all_hooks()
    try:
        yield
    finally:
        if offload in ("model", "sequential"):
            place(pipeline, offload, device=device)
        elif offload == "group":
            _maybe_remove_and_reapply_group_offloading(pipeline.transformer)


def _offload_layers(pipeline: DiffusionPipeline, device: str) -> None:
    """Offload as diffusers' enable_sequential_cpu_offload does, which does not take a CPU as its device."""
    for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        if part is not None:
            cpu_offload(part, torch.device(device), offload_buffers=bool(part._parameters))


def _offload_groups(pipeline: DiffusionPipeline, device: str) -> None:
    """Offload the transformer block by block and the text encoder layer by layer; the small VAE stays."""
    onload = torch.device(device)
    streams: dict[str, Any] = {"use_stream": True, "record_stream": True} if onload.type == "cuda" else {}
    pipeline.vae.to(device)
    apply_group_offloading(
        pipeline.transformer,
        onload_device=onload,
        offload_type="block_level",
        num_blocks_per_group=1,
        **streams,
    )
    if pipeline.text_encoder is not None:
        apply_group_offloading(
            pipeline.text_encoder, onload_device=onload, offload_type="leaf_level", **streams
        )
