"""What each stage of a request needs beside the weights, from the shapes of the tensors that live at once.

The counts below are read off the code that runs: the text encoder, lib/pipelines/attention.py's
block, for the VAE lib/memory/vae.py. tests/unit/memory/test_stages.py holds them to that code.
"""

from dataclasses import dataclass
from typing import Literal

from lib.memory import vae
from lib.memory.live import FLOAT, Kernels
from lib.memory.shapes import ModelShape

Stage = Literal["text_encoding", "image_encoding", "denoising", "decoding"]
Adapted = Literal["none", "attention", "everything"]
FEED_FORWARD = 4
"""Times the width, in every CogVideoX."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """What a request asks for, as far as memory depends on it."""

    width: int
    height: int
    frames: int
    guided: bool = True
    """With guidance above 1 every step is computed twice, together."""
    adapted: Adapted = "none"
    """Which products have a LoRA beside them."""


def stage_bytes(
    shape: ModelShape, kernels: Kernels, clip: Clip, *, image: bool, tiled: bool
) -> dict[Stage, int]:
    """Peak bytes of each stage of a request, without weights. image: whether it begins with one."""
    stages: dict[Stage, int] = {"text_encoding": text_encoding(shape, kernels)}
    size = {"height": clip.height, "width": clip.width}
    if image:
        stages["image_encoding"] = vae.encoding(shape.vae, kernels, **size)
    stages["denoising"] = denoising(shape, kernels, clip)
    stages["decoding"] = vae.decoding(shape.vae, kernels, frames=clip.frames, **size, tiled=tiled)
    return stages


def text_encoding(shape: ModelShape, kernels: Kernels) -> int:
    """One prompt after the other. The most is alive in the activation of the feed-forward, which is written
    out: 4 tensors of its width and 4 of the model's, beside the bias of all pairs of tokens."""
    encoder, tokens = shape.text_encoder, shape.transformer.text_tokens
    bias = encoder.heads * tokens**2
    return (bias + tokens * (4 * encoder.feed_forward + 4 * encoder.width)) * kernels.itemsize


def denoising(shape: ModelShape, kernels: Kernels, clip: Clip) -> int:
    """One step, at the worst of four points of a block.

    All count whole sequences: [batch, text and video tokens, width]. Alive throughout a block are its input
    and the sum it builds; in the attention also the normed sequence, in the feed-forward that and the
    attention's result.
    """
    transformer, item = shape.transformer, kernels.itemsize
    tokens = video_tokens(shape, clip)
    batch = 2 if clip.guided else 1
    sequence = batch * (tokens + transformer.text_tokens) * transformer.width * item
    video = batch * tokens * transformer.width
    points = [
        (4 + 2 * FEED_FORWARD) * sequence,  # before and after the feed-forward's activation
        # Query, key, value and result; flash attention on a CPU packs key and value in 16 bits anew.
        (7 + (2 if kernels.device == "cpu" and item < FLOAT else 0)) * sequence,
    ]
    if transformer.rotary:
        # Query or key turned: its halves swapped, and in float32 both products with their sum or source.
        points.append(6 * sequence + video * (item + 3 * FLOAT))
    if clip.adapted != "none":
        # peft: a product, the LoRA's, and that scaled; query and key are there already.
        points.append((5 + 3) * sequence)
    if clip.adapted == "everything":
        points.append((4 + 3 * FEED_FORWARD) * sequence)
    return max(points) + _around(shape, kernels, clip, tokens)


def video_tokens(shape: ModelShape, clip: Clip) -> int:
    """Tokens of a clip; where one spans several latent frames, the last is filled up."""
    ratio = shape.vae.spatial_ratio * shape.transformer.patch
    span = shape.transformer.temporal_patch or 1
    frames = -(-latent_frames(shape, clip) // span)
    return frames * (clip.height // ratio) * (clip.width // ratio)


def latent_frames(shape: ModelShape, clip: Clip) -> int:
    return (clip.frames - 1) // shape.vae.temporal_ratio + 1


def _around(shape: ModelShape, kernels: Kernels, clip: Clip, tokens: int) -> int:
    """What the loop holds during a step: latents, the scheduler's last guess and the two clean videos that
    forecast steps look at, the input (with an image twice the channels), embeddings of prompt and negative
    prompt and both joined, tables of rotary positions."""
    transformer, item = shape.transformer, kernels.itemsize
    batch = 2 if clip.guided else 1
    places = video_tokens(shape, clip) * transformer.patch**2 * (transformer.temporal_patch or 1)
    latents = places * transformer.out_channels * (item + 3 * FLOAT)
    given = (batch + 1) * places * transformer.in_channels * item
    text = 2 * batch * transformer.text_tokens * transformer.text_width * item
    rotary = 2 * tokens * transformer.head_size * FLOAT if transformer.rotary else 0
    return latents + given + text + rotary
