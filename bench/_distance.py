"""Distances between two clips: PSNR, SSIM, and one in the features of an embedded VAE's encoder."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SSIM_WINDOW = 7
SAME = 100.0
"""PSNR, in dB, that stands for equal clips."""


def distances(frames: np.ndarray, reference: np.ndarray, vae: nn.Module) -> dict[str, float]:
    """Return all distances of two clips, uint8 [frames, height, width, 3]. The VAE is on the CPU."""
    return {
        "PSNR": psnr(frames, reference),
        "SSIM": ssim(frames, reference),
        "perceptual": perceptual(frames, reference, vae),
    }


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """Return the PSNR over all frames, in dB."""
    error = np.mean((frames.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return SAME if error == 0 else min(SAME, float(10 * np.log10(255**2 / error)))


def ssim(frames: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean structural similarity of the frames' luma (Wang et al. 2004), with a square window."""
    first, second = (_luma(clip) for clip in (frames, reference))

    def mean(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, SSIM_WINDOW, stride=1)

    mean_1, mean_2 = mean(first), mean(second)
    spread_1 = mean(first * first) - mean_1**2
    spread_2 = mean(second * second) - mean_2**2
    both = mean(first * second) - mean_1 * mean_2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (2 * mean_1 * mean_2 + c1) * (2 * both + c2)
    return float((ratio / ((mean_1**2 + mean_2**2 + c1) * (spread_1 + spread_2 + c2))).mean())


@torch.inference_mode()
def perceptual(frames: np.ndarray, reference: np.ndarray, vae: nn.Module) -> float:
    """Return LPIPS (Zhang et al. 2018) without its learned weights: 0 for equal clips, at most 4.

    Features of every down block of the encoder, of length 1 at each position; the mean squared length of
    their differences over positions, then over blocks.
    """
    found = [_features(clip, vae) for clip in (frames, reference)]
    return float(np.mean([(a - b).square().sum(1).mean() for a, b in zip(*found, strict=True)]))


def _luma(clip: np.ndarray) -> Tensor:
    """Return luma, [frames, 1, height, width], 0 to 255."""
    return torch.from_numpy(clip.astype(np.float64) @ np.array([0.299, 0.587, 0.114]))[:, None]


def _features(clip: np.ndarray, vae: nn.Module) -> list[Tensor]:
    kept: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: kept.append(F.normalize(out[0], dim=1)))
        for block in vae.encoder.down_blocks
    ]
    try:
        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].to(vae.dtype) / 127.5 - 1
        vae.encode(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return kept
