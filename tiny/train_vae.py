"""Training the VAE: L1 + L2 with more weight on the foreground, a small KL term, and noise on the latents."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tiny import loop, world
from tiny.judge import judge
from tiny.networks import build_vae

PEAK_RATE = 2.5e-3
KL_WEIGHT = 2e-4
LATENT_NOISE = 0.3  # of the latents' deviation; without it small errors of a diffusion model show as speckles


def train_vae(worker: loop.Worker, folder: Path, steps: int, seed: int) -> None:
    """Train for `steps`, resuming from folder/vae.pt, with a checkpoint every 100 steps."""
    torch.manual_seed(seed)
    vae = build_vae().to(worker.device)
    average = loop.Average(vae, 0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint, start = folder / "vae.pt", 0
    if state := loop.load_checkpoint(checkpoint):
        vae.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    log = loop.Log(folder / "vae.jsonl", worker)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(step, steps, peak=PEAK_RATE)
        rng = worker.rng(seed, step)
        video, weight = _batch(rng, step / steps)
        video, weight = video.to(worker.device), weight.to(worker.device)
        torch.manual_seed(int(rng.integers(2**62)))
        with loop.autocast(worker.device):
            posterior = vae.encode(video).latent_dist
            latents = posterior.sample()
            noise = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, 1, device=worker.device)
            latents = latents + noise * latents.detach().std() * torch.randn_like(latents)
            decoded = vae.decode(latents).sample
        error = decoded.float() - video
        reconstruction = (weight * (error.abs() + error**2)).mean()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = reconstruction + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        worker.average_gradients(vae)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae, step)
        if (step + 1) % 25 == 0:
            log(step=step + 1, loss=float(loss.detach()), psnr=_psnr(error), kl=float(kl.detach()))
        if worker.is_main and ((step + 1) % 100 == 0 or step + 1 == steps):
            loop.save_checkpoint(
                checkpoint,
                model=vae.state_dict(),
                average=average.module.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )
        if worker.is_main and ((step + 1) % 500 == 0 or step + 1 == steps):
            log(step=step + 1, **reconstruction_quality(average.module, 20))


def to_tensor(clips: list[np.ndarray]) -> torch.Tensor:
    """Convert uint8 clips [frames, height, width, 3] to float [batch, 3, frames, height, width] in -1..1."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_frames(video: torch.Tensor) -> np.ndarray:
    """Convert float [batch, 3, frames, height, width] in -1..1 to uint8 [batch, frames, height, width, 3]."""
    pixels = ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).cpu().numpy()


@torch.no_grad()
def reconstruction_quality(vae: torch.nn.Module, clips: int, noise: float = 0.0, seed: int = 9) -> dict:
    """Return PSNR in dB and shares of correct attributes for reconstructions of clips not trained on."""
    rng = np.random.default_rng(seed)
    device = next(vae.parameters()).device
    psnr, right = [], []
    for i in range(clips):
        asked = world.ALL_COMBINATIONS[rng.integers(len(world.ALL_COMBINATIONS))]
        video = to_tensor([world.render(world.sample_scene(asked, rng, from_start=i % 2 == 0))])
        latents = vae.encode(video.to(device)).latent_dist.mode()
        latents = latents + noise * latents.std() * torch.randn(latents.shape).to(device)
        decoded = vae.decode(latents).sample.cpu()
        psnr.append(_psnr(decoded.clamp(-1, 1) - video))
        right.append(judge(to_frames(decoded)[0]).agreement(asked))
    return {"psnr_eval": float(np.mean(psnr))} | {k: float(np.mean([r[k] for r in right])) for k in right[0]}


def _psnr(error: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / error.detach().float().pow(2).mean().clamp(min=1e-10)))


def _batch(rng: np.random.Generator, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample a batch [B, 3, F, H, W] and its loss weights: first crops, later complete clips."""
    kind = rng.random()
    if kind < 0.15:
        scenes = [world.sample_vae_scene(rng, 9) for _ in range(16)]
        clips = [world.render(s)[rng.integers(9)][None] for s in scenes]
    elif kind < 0.15 + 0.85 * (1 - progress) * 0.9:
        clips = []
        for _ in range(10):
            clip = world.render(world.sample_vae_scene(rng))
            y, x = rng.integers(0, world.HEIGHT - 31), rng.integers(0, world.WIDTH - 31)
            clips.append(clip[:, y : y + 32, x : x + 32])
    else:
        clips = [world.render(world.sample_vae_scene(rng)) for _ in range(4)]
    video = to_tensor(clips)
    ground = video[:, :, :1, :1, :1]
    foreground = ((video - ground).abs().amax(1, keepdim=True) > 0.1).float()
    grown = F.max_pool3d(foreground, (1, 5, 5), stride=1, padding=(0, 2, 2))
    weight = 1 + 3 * grown
    return video, weight / weight.mean()
