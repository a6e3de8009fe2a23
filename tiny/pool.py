"""Latents of thousands of rendered clips, encoded once by the trained VAE and cached on disk."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tiny import loop, world
from tiny.networks import SPATIAL_RATIO, TEMPORAL_RATIO
from tiny.train_vae import to_tensor

BATCH = 8


@dataclass(kw_only=True, slots=True)
class Pool:
    """Unscaled latents of N clips, fp16 [N, frames, channels, height, width]."""

    mean: torch.Tensor
    std: torch.Tensor
    mask: torch.Tensor
    """How much of each latent cell the shape covers, in 0..1, [N, frames, 1, height, width]."""
    combination: torch.Tensor
    """Index into world.TRAINED_COMBINATIONS, [N]."""
    image_mean: torch.Tensor | None = None
    """First frames encoded separately, with the noise of image-to-video training; [N, 1, ...]."""
    image_std: torch.Tensor | None = None

    def scaling_factor(self) -> float:
        """Return 1 / the standard deviation of all latents."""
        return 1 / float((self.mean.float().var() + self.std.float().pow(2).mean()).sqrt())


@torch.no_grad()
def build_pool(
    vae: torch.nn.Module, worker: loop.Worker, path: Path, *, per_combination: int, images: bool, seed: int
) -> Pool:
    """Render and encode this worker's share, all trained combinations equally often; cached at `path`."""
    if stored := loop.load_checkpoint(path):
        return Pool(**stored)
    rng = worker.rng(seed, 10**6)
    order = np.repeat(np.arange(len(world.TRAINED_COMBINATIONS)), per_combination)[
        worker.rank :: worker.count
    ]
    rng.shuffle(order)
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        clips = [
            world.render(world.sample_scene(world.TRAINED_COMBINATIONS[i], rng, from_start=images))
            for i in chosen
        ]
        video = to_tensor(clips).to(worker.device)
        encoded = _encode(vae, video, worker.device, "mean", "std") | {
            "mask": _mask(video),
            "combination": torch.from_numpy(chosen.copy()),
        }
        if images:
            sigma = np.exp(rng.normal(-3.0, 0.5, (len(video), 1, 1, 1, 1)))
            noise = sigma * rng.standard_normal(video[:, :, :1].shape)
            first = video[:, :, :1] + torch.from_numpy(noise).to(video)
            encoded |= _encode(vae, first, worker.device, "image_mean", "image_std")
        for name, value in encoded.items():
            parts.setdefault(name, []).append(value.cpu())
    stored = {name: torch.cat(values) for name, values in parts.items()}
    loop.save_checkpoint(path, **stored)
    return Pool(**stored)


def _encode(vae: torch.nn.Module, video: torch.Tensor, device: str, *names: str) -> dict[str, torch.Tensor]:
    with loop.autocast(device):
        posterior = vae.encode(video).latent_dist
    return {n: v.transpose(1, 2).half() for n, v in zip(names, (posterior.mean, posterior.std), strict=True)}


def _mask(video: torch.Tensor) -> torch.Tensor:
    foreground = ((video - video[:, :, :1, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    first = F.avg_pool3d(foreground[:, :, :1], (1, SPATIAL_RATIO, SPATIAL_RATIO))
    rest = F.avg_pool3d(foreground[:, :, 1:], (TEMPORAL_RATIO, SPATIAL_RATIO, SPATIAL_RATIO))
    return torch.cat([first, rest], dim=2).transpose(1, 2).half()
