"""Decoded frames -> what the vision tower takes. A few at a time: 24 of 1080p at once would be 570 MB."""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's."""


AT_ONCE_BYTES = 64 << 20
"""Of frames in float32 before they are scaled. A clip that fits is scaled whole, as the original's are: torch
rounds the last bit by how many frames there are, where they are few or small."""


def clip_pixel_values(frames: Iterator[np.ndarray], size: int) -> torch.Tensor:
    """A clip's frames, uint8 [H, W, 3] each and one at least, as float32 [T, 3, size, size]."""
    first = next(frames)
    at_once = max(1, AT_ONCE_BYTES // (4 * first.size))
    parts = [pixel_values(np.stack([first, *islice(frames, at_once - 1)]), size)]
    while following := list(islice(frames, at_once)):
        parts.append(pixel_values(np.stack(following), size))
    return torch.cat(parts)


def pixel_values(frames: np.ndarray, size: int) -> torch.Tensor:
    """Frames, uint8 [T, H, W, 3], as float32 [T, 3, size, size]: normalised, scaled, the middle square.

    Normalising before scaling, the floor in the longer side and the rounding of the crop are the original's.
    """
    values = torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)
    values = values.to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(numbers).view(3, 1, 1, 1) for numbers in (MEAN, STD))
    values.div_(255.0).sub_(mean).div_(std)  # in place: a frame of 8K takes 800 MB
    height, width = values.shape[2:]
    if width < height:
        scaled = math.floor(height / width * size), size
    else:
        scaled = size, math.floor(width / height * size)
    # As [C, T, H, W], like the original: torch rounds [T, C, H, W] in another way.
    values = F.interpolate(values, size=scaled, mode="bilinear", align_corners=False)
    top, left = (round((side - size) / 2.0) for side in scaled)
    return values[..., top : top + size, left : left + size].transpose(0, 1).contiguous()
