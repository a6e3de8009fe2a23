"""Putting a pipeline's parts where a memory plan wants them, and back after what changes them.

place(pipeline, "text", device="cuda")
rest_text_encoder(pipeline)     # after prompts are encoded
with unhooked(pipeline, "model"):
    ...                         # what adds or removes layers
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lib.memory.model import Offload

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def place(pipeline: "DiffusionPipeline", offload: Offload, *, device: str) -> None:
    """Move what stays to `device`, and have the rest come there when it is used.

    All plans but resident keep the weights that are not there in system memory.
    """
    if offload == "resident":
        pipeline.to(device)
    elif offload == "text":
        pipeline.transformer.to(device)
        pipeline.vae.to(device)
        _bring_text_encoder(pipeline, device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        _bring_groups(pipeline, device)
    else:
        _bring_layers(pipeline, device)


def rest_text_encoder(pipeline: "DiffusionPipeline") -> None:
    """Make room once prompts are encoded, where the plan brought the whole text encoder for it."""
    hook = getattr(pipeline.text_encoder, "_hf_hook", None)
    if hook is None:
        return
    from accelerate.hooks import CpuOffload

    if isinstance(hook, CpuOffload):
        pipeline.text_encoder.to("cpu")


@contextmanager
def unhooked(pipeline: "DiffusionPipeline", offload: Offload) -> Iterator[None]:
    """Inside the block the transformer's layers may be replaced.

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
            from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

            _maybe_remove_and_reapply_group_offloading(pipeline.transformer)


def _bring_text_encoder(pipeline: "DiffusionPipeline", device: str) -> None:
    from accelerate import cpu_offload_with_hook

    if pipeline.text_encoder is not None:
        cpu_offload_with_hook(pipeline.text_encoder, device)


def _bring_layers(pipeline: "DiffusionPipeline", device: str) -> None:
    """What diffusers' sequential offloading does, which cannot be given a CPU."""
    import torch
    from accelerate import cpu_offload

    for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        if part is not None:
            cpu_offload(part, torch.device(device), offload_buffers=bool(part._parameters))


def _bring_groups(pipeline: "DiffusionPipeline", device: str) -> None:
    """Blocks of the transformer one by one, the text encoder layer by layer; the VAE, small, stays."""
    import torch
    from diffusers.hooks import apply_group_offloading

    streams = {"use_stream": True, "record_stream": True} if torch.device(device).type == "cuda" else {}
    pipeline.vae.to(device)
    apply_group_offloading(
        pipeline.transformer,
        onload_device=torch.device(device),
        offload_type="block_level",
        num_blocks_per_group=1,
        **streams,
    )
    if pipeline.text_encoder is not None:
        apply_group_offloading(
            pipeline.text_encoder, onload_device=torch.device(device), offload_type="leaf_level", **streams
        )
