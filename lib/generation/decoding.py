"""Latents to frames, passed on as they are decoded so that they can be written meanwhile."""

from typing import Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline

from lib.progress import Report, print_line


class FrameSink(Protocol):
    """Takes frames, uint8 [n, height, width, 3], in the clip's order."""

    def add(self, frames: np.ndarray) -> None: ...

    def restart(self) -> None:
        """Discard all frames so far: the clip is decoded again from its start."""


class FrameCollector:
    """A sink that keeps the clip in memory."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, frames: np.ndarray) -> None:
        self._parts.append(frames)

    def restart(self) -> None:
        self._parts.clear()

    def clip(self) -> np.ndarray:
        """Return all frames: uint8 [frames, height, width, 3]."""
        return np.concatenate(self._parts)


def decode_latents(
    pipeline: DiffusionPipeline,
    latents: torch.Tensor,
    sink: FrameSink,
    *,
    tiled: bool = False,
    report: Report = print_line,
) -> None:
    """Decode [1, f, C, h, w] into the sink, in tiles on request or when GPU memory runs out otherwise."""
    if tiled:
        return _decode_in_tiles(pipeline, latents, sink)
    try:
        return _decode(pipeline, latents, sink)
    except torch.cuda.OutOfMemoryError:
        pass  # tried again below, where the error no longer holds references to the first attempt's tensors
    torch.cuda.empty_cache()
    report("Decoding did not fit into GPU memory; decoding in tiles.")
    sink.restart()
    _decode_in_tiles(pipeline, latents, sink)


def _decode_in_tiles(pipeline: DiffusionPipeline, latents: torch.Tensor, sink: FrameSink) -> None:
    was_tiling = pipeline.vae.use_tiling
    pipeline.vae.enable_tiling()
    try:
        _decode(pipeline, latents, sink)
    finally:
        pipeline.vae.use_tiling = was_tiling


def _decode(pipeline: DiffusionPipeline, latents: torch.Tensor, sink: FrameSink) -> None:
    vae = pipeline.vae
    height, width = latents.shape[-2:]
    if vae.use_tiling and (height > vae.tile_latent_min_height or width > vae.tile_latent_min_width):
        sink.add(_pixels(pipeline, pipeline.decode_latents(latents)))
        return
    # Without tiles the VAE decodes a few latent frames at a time, each group once and in order.
    hook = vae.decoder.register_forward_hook(lambda module, args, out: sink.add(_pixels(pipeline, out[0])))
    try:
        pipeline.decode_latents(latents)
    finally:
        hook.remove()


def _pixels(pipeline: DiffusionPipeline, video: torch.Tensor) -> np.ndarray:
    """[1, 3, f, H, W] in -1 to 1 -> uint8 [f, H, W, 3]."""
    pixels = pipeline.video_processor.postprocess_video(video, output_type="np")[0]
    return (pixels * 255).round().astype(np.uint8)
