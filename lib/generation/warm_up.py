"""Compile a server's blocks during setup by making a first request."""

import torch
from PIL import Image

from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.progress import silent


def warm_up(generator: Generator) -> None:
    """Compile what a usual request needs: one guided step at the model's own size.

    It has the model's own length, or the longest that the memory plan allows.
    """
    spec = generator.spec
    image = Image.new("RGB", (spec.width, spec.height)) if spec.task == "i2v" else None
    request = build_request(
        spec,
        prompt="",
        negative_prompt="",
        num_inference_steps=1,
        guidance_scale=spec.guidance_scale,
        num_frames=generator.plan.frames if generator.plan else None,
        width=spec.width,
        height=spec.height,
        fps=None,
        seed=0,
        use_dynamic_cfg=False,
        scheduler="default",
        image=image,
    )
    transformer = generator.pipeline.transformer
    shape = (1, spec.text_tokens, transformer.config.text_embed_dim)
    zeros = torch.zeros(shape, device=generator.pipeline._execution_device, dtype=transformer.dtype)
    report, generator.report = generator.report, silent
    try:
        generator.latents(request, (zeros, zeros), check=lambda: None)
    finally:
        generator.report = report
