"""One decoded frame -> what the vision tower takes. Frame by frame: 24 of 1080p at once would be 570 MB."""

import math

import numpy as np
import torch
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's."""


def pixel_values(frame: np.ndarray, size: int) -> torch.Tensor:
    """A frame, uint8 [H, W, 3], as float32 [3, size, size]: normalised, its middle square, scaled.

    Normalising before scaling, the floor in the longer side and the rounding of the crop are the original's.
    """
    values = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
    values = values.to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    values.div_(255.0).sub_(mean).div_(std)  # in place: a frame of 8K takes 800 MB
    height, width = values.shape[1:]
    if width < height:
        scaled = math.floor(height / width * size), size
    else:
        scaled = size, math.floor(width / height * size)
    # As [C, T, H, W], like the original: on one thread torch rounds a [1, 3, H, W] in another way.
    values = F.interpolate(values[:, None], size=scaled, mode="bilinear", align_corners=False)[:, 0]
    top, left = (round((side - size) / 2.0) for side in scaled)
    return values[:, top : top + size, left : left + size].contiguous()
