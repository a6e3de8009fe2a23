"""Turn a clip and a question into the model's inputs: pixel values, and tokens with types and positions.

Everything is computed as in the original code, whose values are in tests/data/caption.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from lib.caption.request import FrameSampling, Template

MAX_FRAMES = 24
BASE_SECONDS = 60.0
AUTO_SECONDS = (2.0, 24.0)
"""Durations for which one frame per second gives more than one or two frames and covers the clip."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalization of pixel values."""
CHUNK_BYTES = 64 << 20
"""Size of the float32 frames that are scaled at once: 24 frames of 1080p would take 570 MB. A clip that fits
is scaled in one call, as in the original, since torch's rounding depends on the number of frames."""

TEMPLATES: dict[Template, str] = {
    "chat": "Question: {} Answer:",
    "base": "{}",
    "vqa": "Question: {} Short answer:",
}
LANGUAGE, VISION = 0, 1
"""Token types."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """The prompt for one clip; int64 tensors [L]."""

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    position_ids: torch.Tensor


def choose_frames(
    timestamps: np.ndarray, *, fps: float, duration: float, sampling: FrameSampling
) -> tuple[list[int], Literal["chat", "base", "uniform"]]:
    """Return the indices of at most 24 distinct frames in order, and the sampling used (auto resolved).

    chat: the frames nearest to seconds 0 to 23. base: 24 evenly spaced over the first 60 seconds. uniform: 24
    evenly spaced over the clip. auto: chat for clips of 2 to 24 seconds, otherwise uniform.

    Args:
        timestamps: float64 [T], seconds from the first frame.
        fps: Mean frame rate; 0 if unknown.
        duration: In seconds.
    """
    if sampling == "auto":
        shortest, longest = AUTO_SECONDS
        sampling = "chat" if shortest <= duration <= longest else "uniform"
    count = len(timestamps)
    if sampling == "chat":
        seconds = range(min(round(float(timestamps.max())) + 1, MAX_FRAMES))
        chosen = [int(np.abs(timestamps - second).argmin()) for second in seconds]
    elif sampling == "base":
        end = min(count, int(BASE_SECONDS * fps)) if fps > 0 else count
        chosen = np.linspace(0, max(end, 1) - 1, MAX_FRAMES, dtype=int).tolist()
    else:
        chosen = np.rint(np.linspace(0, count - 1, min(MAX_FRAMES, count))).astype(int).tolist()
    return sorted(set(chosen)), sampling


def clip_pixel_values(frames: Iterator[np.ndarray], size: int) -> torch.Tensor:
    """Return frames, uint8 [H, W, 3], at least one, as float32 [T, 3, size, size], scaling chunk by chunk."""
    first = next(frames)
    chunk = max(1, CHUNK_BYTES // (4 * first.size))
    parts = [pixel_values(np.stack([first, *islice(frames, chunk - 1)]), size)]
    while following := list(islice(frames, chunk)):
        parts.append(pixel_values(np.stack(following), size))
    return torch.cat(parts)


def pixel_values(frames: np.ndarray, size: int) -> torch.Tensor:
    """Normalize frames, uint8 [T, H, W, 3], scale their shorter side to `size` and crop the center square.

    Returns float32 [T, 3, size, size].
    """
    # As in the original: normalize before scaling, round the longer side down, round the crop's corner.
    values = torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)
    values = values.to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(numbers).view(3, 1, 1, 1) for numbers in (MEAN, STD))
    values.div_(255.0).sub_(mean).div_(std)  # in place: an 8K frame takes 800 MB
    height, width = values.shape[2:]
    if width < height:
        scaled = math.floor(height / width * size), size
    else:
        scaled = size, math.floor(width / height * size)
    # As [C, T, H, W] like the original: torch rounds [T, C, H, W] differently.
    values = F.interpolate(values, size=scaled, mode="bilinear", align_corners=False)
    top, left = (round((side - size) / 2.0) for side in scaled)
    return values[..., top : top + size, left : left + size].transpose(0, 1).contiguous()


def build_prompt(
    question: str, *, frames: int, template: Template, tokens_per_frame: int, bos: int, pad: int,
    encode: Callable[[str], list[int]],
) -> Prompt:  # fmt: skip
    """Return the prompt for a clip of `frames` frames.

    It consists of the start token, `tokens_per_frame` padding tokens for each frame (in chat followed by the
    frame's number), and the question. The vision tower's output replaces the embeddings of the padding.
    `encode` tokenizes text without special tokens.
    """
    ids, types = [bos], [LANGUAGE]
    for number in range(frames):
        ids += [pad] * tokens_per_frame
        types += [VISION] * tokens_per_frame
        if template == "chat":
            digits = encode(str(number))
            ids += digits
            types += [LANGUAGE] * len(digits)
    text = encode(TEMPLATES[template].format(question))
    ids += text
    types += [LANGUAGE] * len(text)
    return Prompt(
        input_ids=torch.tensor(ids),
        token_type_ids=torch.tensor(types),
        position_ids=build_position_ids(torch.tensor(types)),
    )


def build_position_ids(token_type_ids: torch.Tensor) -> torch.Tensor:
    """Return positions [L] for token types [L].

    The inner tokens of a run of vision tokens (all but its first and last) share one position; every other
    token advances by one. In base, which has no language tokens between frames, the clip is a single run.
    """
    vision = token_type_ids == VISION
    before = torch.roll(vision, 1)
    before[0] = False
    after = torch.roll(vision, -1)
    after[-1] = False
    inner = vision & before & after
    follows_inner = torch.roll(inner, 1)
    follows_inner[0] = False
    step = ~inner | ~follows_inner
    step[0] = False
    return step.cumsum(0)


def pad_left(prompts: list[Prompt], pad: int) -> tuple[torch.Tensor, ...]:
    """Batch prompts of different lengths, padded on the left.

    Returns input ids, token types, positions and attention mask, each [B, L].
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    types, positions, mask = (torch.zeros_like(ids) for _ in range(3))
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        ids[row, start:], types[row, start:] = prompt.input_ids, prompt.token_type_ids
        positions[row, start:], mask[row, start:] = prompt.position_ids, 1
    return ids, types, positions, mask
