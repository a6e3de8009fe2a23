"""Latents to frames, handed on as they are decoded so that they can be written meanwhile."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline


class FrameSink(Protocol):
    """What takes frames, uint8 [n, height, width, 3], in the clip's order."""

    def add(self, frames: "np.ndarray") -> None: ...

    def restart(self) -> None:
        """Forget what came so far: the clip begins again."""


class Collected:
    """A sink that keeps the clip."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, frames: "np.ndarray") -> None:
        self._parts.append(frames)

    def restart(self) -> None:
        self._parts.clear()

    def whole(self) -> "np.ndarray":
        """uint8 [frames, height, width, 3]"""
        import numpy as np

        return np.concatenate(self._parts)


def decode_latents(
    pipeline: "DiffusionPipeline",
    latents: "torch.Tensor",
    sink: FrameSink,
    *,
    tiled: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Decode [1, f, C, h, w] into the sink, in tiles when asked for or when a GPU has no room for more."""
    import torch

    if tiled:
        return _decode_in_tiles(pipeline, latents, sink)
    try:
        return _decode(pipeline, latents, sink)
    except torch.cuda.OutOfMemoryError:
        pass  # tried again below, where the error no longer holds what the first try had made
    torch.cuda.empty_cache()
    report("Decoding did not fit into GPU memory; decoding in tiles.")
    sink.restart()
    _decode_in_tiles(pipeline, latents, sink)


def _decode_in_tiles(pipeline: "DiffusionPipeline", latents: "torch.Tensor", sink: FrameSink) -> None:
    was_tiling = pipeline.vae.use_tiling
    pipeline.vae.enable_tiling()
    try:
        _decode(pipeline, latents, sink)
    finally:
        pipeline.vae.use_tiling = was_tiling


def _decode(pipeline: "DiffusionPipeline", latents: "torch.Tensor", sink: FrameSink) -> None:
    vae = pipeline.vae
    height, width = latents.shape[-2:]
    if vae.use_tiling and (height > vae.tile_latent_min_height or width > vae.tile_latent_min_width):
        sink.add(_pixels(pipeline, pipeline.decode_latents(latents)))
        return
    # Untiled, the VAE decodes a few latent frames at a time, one after the other and for good.
    hook = vae.decoder.register_forward_hook(lambda module, args, out: sink.add(_pixels(pipeline, out[0])))
    try:
        pipeline.decode_latents(latents)
    finally:
        hook.remove()


def _pixels(pipeline: "DiffusionPipeline", video: "torch.Tensor") -> "np.ndarray":
    """[1, 3, f, H, W] in -1 to 1 -> uint8 [f, H, W, 3]."""
    import numpy as np

    pixels = pipeline.video_processor.postprocess_video(video, output_type="np")[0]
    return (pixels * 255).round().astype(np.uint8)
