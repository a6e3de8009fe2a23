"""Make clips during training, as the service would make them with the LoRA at that step."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel

from lib.generation.generator import Generator
from lib.generation.request import Request, build_request
from lib.progress import Report, progress_line, silent
from lib.video.images import read_image
from lib.video.writer import write_video
from training.base import load_scheduler, load_vae
from training.devices import free_memory
from training.groups import ComputeConfig, ValidationConfig
from training.latents import Encodings
from training.plan import Plan


def validation_requests(config: ValidationConfig, plan: Plan) -> list[Request]:
    """Return a request per prompt and repetition, each with its own seed, which is the same at every step.

    Raises UserError for an image that cannot be read.
    """
    images = [
        read_image(path, name=f"validation image {Path(path).name}") for path in config.validation_images
    ]
    requests: list[Request] = []
    for index, prompt in enumerate(config.prompts):
        for _ in range(config.num_validation_videos):
            request = build_request(
                plan.spec,
                prompt=prompt,
                negative_prompt="",
                num_inference_steps=config.validation_inference_steps,
                guidance_scale=config.guidance_scale,
                num_frames=_num_frames(plan),
                width=plan.sampling.width,
                height=plan.sampling.height,
                fps=round(plan.sampling.fps),
                seed=(plan.seed + len(requests)) % 2**32,
                use_dynamic_cfg=config.use_dynamic_cfg,
                scheduler="default",
                image=images[index] if images else None,
                any_size=True,
            )
            requests.append(request)
    return requests


def make_clips(
    plan: Plan, requests: list[Request], transformer: CogVideoXTransformer3DModel, encodings: Encodings,
    folder: Path, *, compute: ComputeConfig, step: int, stop: threading.Event, report: Report,
) -> list[tuple[Path, np.ndarray]]:  # fmt: skip
    """Make a clip of every request and write it into `folder`; return paths and frames, uint8 [F, H, W, 3].

    The VAE with its decoder is loaded for this and freed again. Meanwhile the LoRA is in the base's type, as
    it is when it serves. Raises Stopped when `stop` is set.
    """
    vae = load_vae(plan, tiling=compute.enable_tiling, slicing=compute.enable_slicing)
    kind: Any = CogVideoXImageToVideoPipeline if plan.is_i2v else CogVideoXPipeline
    pipeline = kind(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=load_scheduler(plan.folder),
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = Generator(spec=plan.spec, pipeline=pipeline, report=silent)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    try:
        with as_served(transformer, plan.dtype):
            for number, request in enumerate(requests, start=1):
                report(progress_line("validation clips", number, len(requests)))
                positive, negative = (
                    encodings.prompt(text)[None].to(plan.device, plan.dtype) for text in (request.prompt, "")
                )
                frames = generator.frames(request, embeddings=(positive, negative), stop=stop)
                path = write_video(
                    frames,
                    folder / f"step-{step:06d}-{number}.mp4",
                    fps=request.fps,
                    format="mp4",
                    metadata={"step": str(step)} | request.metadata(),
                )
                made.append((path, frames))
    finally:
        del pipeline, generator, vae
        free_memory()
    return made


@contextlib.contextmanager
def as_served(transformer: CogVideoXTransformer3DModel, dtype: torch.dtype) -> Iterator[None]:
    """Set the transformer to evaluation, with its float32 LoRA matrices rounded to the type they serve in."""
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


def _num_frames(plan: Plan) -> int:
    """Return the longest valid length that samples may have."""
    step = plan.sampling.frame_step
    return max(1, (plan.sampling.max_frames - 1) // step) * step + 1
