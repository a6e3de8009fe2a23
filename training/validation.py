"""Clips made during training, as the service would make them with the LoRA as it stands."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lib.generation.generator import Generator
from lib.generation.request import Request, build_request
from lib.video.images import read_image
from lib.video.reader import write_video
from training.latents import Encodings
from training.memory import free_memory
from training.plan import Plan

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel


@dataclass(frozen=True, slots=True)
class Wanted:
    """One validation clip: its request, and its number among them."""

    number: int
    request: Request


def validation_requests(plan: Plan) -> list[Wanted]:
    """One request per prompt and repetition, with a seed of its own that is the same at every step.

    Raises UserError for an image that cannot be read.
    """
    config, spec = plan.config, plan.spec
    images = [
        read_image(path, name=f"validation image {Path(path).name}") for path in config.validation_images
    ]
    found: list[Wanted] = []
    for index, prompt in enumerate(config.validation_prompts):
        for _ in range(config.num_validation_videos):
            request = build_request(
                spec,
                prompt=prompt,
                negative_prompt="",
                num_inference_steps=config.validation_inference_steps,
                guidance_scale=config.guidance_scale,
                num_frames=_longest(plan),
                width=plan.sampling.width,
                height=plan.sampling.height,
                fps=round(plan.sampling.fps),
                seed=(plan.seed + len(found)) % 2**32,
                use_dynamic_cfg=config.use_dynamic_cfg,
                scheduler="default",
                image=images[index] if images else None,
                any_size=True,
            )
            found.append(Wanted(len(found) + 1, request))
    return found


def validate(
    plan: Plan, wanted: list[Wanted], transformer: "CogVideoXTransformer3DModel", encodings: Encodings,
    folder: Path, *, step: int, stop: threading.Event, report: Callable[[str], None],
) -> list[tuple[Path, np.ndarray]]:  # fmt: skip
    """Make every wanted clip and write it into `folder`; the paths and frames, uint8 [F, H, W, 3].

    Raises Stopped when `stop` is set.

    The VAE with its decoder comes from the disk for this and goes again. The LoRA computes in the base's type
    meanwhile, as it will when it serves.
    """
    from diffusers import AutoencoderKLCogVideoX, CogVideoXImageToVideoPipeline, CogVideoXPipeline

    dtype = getattr(torch, plan.dtype)
    vae = AutoencoderKLCogVideoX.from_pretrained(
        plan.folder, subfolder="vae", dtype=dtype, local_files_only=True, use_safetensors=True
    )
    vae.to(plan.device)
    if plan.config.enable_slicing:
        vae.enable_slicing()
    if plan.config.enable_tiling:
        vae.enable_tiling()
    kind = CogVideoXImageToVideoPipeline if plan.is_i2v else CogVideoXPipeline
    pipeline = kind(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=load_scheduler(plan.folder),
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = Generator(spec=plan.spec, pipeline=pipeline, report=lambda line: None)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    try:
        with as_served(transformer, dtype):
            for clip in wanted:
                report(f"progress: validation clips {clip.number}/{len(wanted)}")
                embeddings = tuple(
                    encodings.prompt(text)[None].to(plan.device, dtype) for text in (clip.request.prompt, "")
                )
                frames = generator.frames(clip.request, embeddings=embeddings, stop=stop)
                path = write_video(
                    frames,
                    folder / f"step-{step:06d}-{clip.number}.mp4",
                    fps=clip.request.fps,
                    format="mp4",
                    metadata={"prompt": clip.request.prompt, "step": str(step)} | clip.request.settings(),
                )
                made.append((path, frames))
    finally:
        del pipeline, generator, vae
        free_memory()
    return made


@contextlib.contextmanager
def as_served(transformer: "CogVideoXTransformer3DModel", dtype: torch.dtype) -> Iterator[None]:
    """The transformer in evaluation, its float32 LoRA matrices rounded to the type they will serve in."""
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    exact = [parameter.data for parameter in trained]
    transformer.eval()
    try:
        for parameter in trained:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(trained, exact, strict=True):
            parameter.data = data
        transformer.train()


def load_scheduler(folder: Path) -> object:
    """The scheduler of the checkpoint, of the class that it names."""
    import diffusers

    from lib.models.derive import read_config

    name = read_config(folder / "scheduler" / "scheduler_config.json", "_class_name")["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler", local_files_only=True)


def _longest(plan: Plan) -> int:
    """The base's length, or the longest valid one that the samples may have."""
    step = plan.sampling.frame_step
    return max(1, (plan.sampling.max_frames - 1) // step) * step + 1
