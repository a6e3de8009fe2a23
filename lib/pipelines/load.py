"""A ready diffusers pipeline for a spec, a folder and this machine, with the memory plan it runs under."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lib.memory.model import MemoryModel, Weights
from lib.memory.plan import MemoryPlan, choose_plan
from lib.models.specs import ModelSpec
from lib.pipelines import acceleration
from lib.pipelines.acceleration import PLAIN, Acceleration
from lib.pipelines.machine import Machine
from lib.pipelines.machine import inspect_machine as inspect_machine
from lib.pipelines.offload import place

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


def plan_memory(
    spec: ModelSpec,
    folder: Path,
    machine: Machine,
    *,
    forced: str | None = None,
    weights: Weights = "none",
) -> MemoryPlan:
    """The plan of lib/memory/plan.py for the model in a folder, its weights stored as they will be.

    forced is COGVIDEOX_OFFLOAD. Raises UserError when it is no plan's name, and when nothing fits.
    """
    return choose_plan(spec, MemoryModel.of(spec, folder, machine, weights=weights), machine, forced=forced)


def load_pipeline(
    spec: ModelSpec,
    folder: Path,
    machine: Machine,
    plan: MemoryPlan,
    *,
    text_encoder: bool = True,
    settings: Acceleration = PLAIN,
) -> "DiffusionPipeline":
    """Load a folder without touching the network and place it as planned, computing as `settings` say.

    Without its text encoder the pipeline takes embeddings only.
    """
    acceleration.prepare(settings)

    import diffusers
    import torch

    from lib.pipelines import attention
    from lib.pipelines.components import load_components

    silence_libraries()
    # What will be quantised may not fit on the device as it is.
    stays = plan.offload in ("resident", "text")
    straight = stays and settings.quantization == "none"
    parts = load_components(
        folder,
        dtype=getattr(torch, machine.dtype),
        device=machine.device if straight else "cpu",
        text_encoder=text_encoder,
    )
    pipeline = getattr(diffusers, spec.pipeline_class)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    _widen_grid(pipeline)
    attention.install(pipeline.transformer)
    acceleration.shrink(pipeline, settings, device=machine.device if stays else "cpu")
    acceleration.hasten(pipeline.transformer, settings)  # inside of what moves the weights
    place(pipeline, plan.offload, device=machine.device)
    if stays and not settings.compiled:  # compiled code would ask where in memory each weight is
        attention.fuse_projections(pipeline.transformer)
    return pipeline


def _widen_grid(pipeline: "DiffusionPipeline") -> None:
    """Let 1.5 make portraits: diffusers cuts its positions from a grid that some copies made 96x170.

    A larger grid begins with the same positions; the weights know nothing of its end.
    """
    config = pipeline.transformer.config
    if config.get("patch_size_t") is not None:
        side = max(config.sample_height, config.sample_width)
        pipeline.transformer.register_to_config(sample_height=side, sample_width=side)


def silence_libraries() -> None:
    """No bars and warnings of diffusers and transformers: what the caller should know is reported by us.

    transformers is not imported for that: where it is not there yet, it will start silent.
    """
    import diffusers.utils.logging
    from huggingface_hub.utils import disable_progress_bars

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    disable_progress_bars()  # transformers takes after it
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    if "transformers" in sys.modules:
        import transformers.utils.logging

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


def build_scheduler(name: Literal["default", "ddim", "dpm"], original: "SchedulerMixin") -> "SchedulerMixin":
    """The checkpoint's own scheduler, or CogVideoX's DDIM or DPM with its settings and trailing timesteps."""
    if name == "default":
        return original
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    kind = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[name]
    return kind.from_config(original.config, timestep_spacing="trailing")
