"""Refining the embedded VAE's decoder. Its encoder is unchanged, so models trained on its latents still work.

After the first training it could not decode content outside the captions: a moving star became a circle,
which fine-tuning a transformer cannot correct.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch.nn import functional as F

from tiny import loop, world
from tiny.networks import build_vae
from tiny.train_vae import LATENT_NOISE, reconstruction_quality, to_tensor

EMBEDDED = Path(__file__).resolve().parent.parent / "weights" / "tiny-t2v" / "vae"
PEAK_RATE = 1e-3
BATCH = 4
EXTRA_SHARE = 0.5
SHAPE_SHARES = (0.1, 0.1, 0.1, 0.4, 0.3)  # circle, square, triangle, star, ring
MOTION_SHARES = (0.1, 0.1, 0.1, 0.1, 0.1, 0.35, 0.15)  # left, right, up, down, still, circling, zigzag


def train_decoder(worker: loop.Worker, folder: Path, steps: int, seed: int) -> None:
    """Train for `steps`, resuming from folder/decoder.pt, with a checkpoint every 100 steps.

    Begins with folder/vae.pt, or without one with the embedded VAE.
    """
    vae = _first_vae(folder).to(worker.device).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    average = loop.Average(vae.decoder, 0.998)
    optimizer = torch.optim.AdamW(
        vae.decoder.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    checkpoint, start = folder / "decoder.pt", 0
    if state := loop.load_checkpoint(checkpoint):
        vae.decoder.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    log = loop.Log(folder / "decoder.jsonl", worker)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(step, steps, peak=PEAK_RATE, warmup=50)
        rng = worker.rng(seed, step)
        video = to_tensor([world.render(_scene(rng)) for _ in range(BATCH)]).to(worker.device)
        torch.manual_seed(int(rng.integers(2**62)))
        with loop.autocast(worker.device):
            with torch.no_grad():
                latents = vae.encode(video).latent_dist.sample().float()
                # Half of the clips without noise, the rest with up to the noise of the first training.
                level = LATENT_NOISE * torch.rand(BATCH, 1, 1, 1, 1, device=worker.device)
                level = level * (torch.rand(BATCH, 1, 1, 1, 1, device=worker.device) < 0.5)
                latents = latents + level * latents.std() * torch.randn_like(latents)
            decoded = vae.decode(latents).sample.float()
        loss = _loss(decoded, video)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        worker.average_gradients(vae.decoder)
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        average.update(vae.decoder, step)
        if (step + 1) % 25 == 0:
            log(step=step + 1, loss=float(loss.detach()))
        last = step + 1 == steps
        if worker.is_main and ((step + 1) % 100 == 0 or last):
            loop.save_checkpoint(
                checkpoint,
                model=vae.decoder.state_dict(),
                average=average.module.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )
        if worker.is_main and ((step + 1) % 500 == 0 or last):
            trained, vae.decoder = vae.decoder, average.module
            log(step=step + 1, **reconstruction_quality(vae, 20))
            vae.decoder = trained


def _first_vae(folder: Path) -> AutoencoderKLCogVideoX:
    if state := loop.load_checkpoint(folder / "vae.pt"):
        vae = build_vae()
        vae.load_state_dict(state["average"])
        return vae
    return AutoencoderKLCogVideoX.from_pretrained(EMBEDDED, dtype=torch.float32, local_files_only=True)


def _loss(decoded: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """Return L1 and L2, with more weight on the shape and around it."""
    ground = video[:, :, :1, :1, :1]
    foreground = ((video - ground).abs().amax(1, keepdim=True) > 0.1).float()
    weight = 1 + 5 * F.max_pool3d(foreground, (1, 5, 5), stride=1, padding=(0, 2, 2))
    error = decoded - video
    return (weight / weight.mean() * (error.abs() + error**2)).mean()


def _scene(rng: np.random.Generator) -> world.Scene:
    """Sample a scene of the captions in half of the cases, otherwise any shape, colour and motion."""
    if rng.random() >= EXTRA_SHARE:
        asked = world.ALL_COMBINATIONS[rng.integers(len(world.ALL_COMBINATIONS))]
        return world.sample_scene(asked, rng, from_start=bool(rng.random() < 0.5))
    shapes, motions = world.SHAPES + world.EXTRA_SHAPES, world.MOTIONS + world.EXTRA_MOTIONS
    colours = [*world.COLOURS.values(), *world.EXTRA_COLOURS.values()]
    middle = (world.WIDTH / 2 + rng.uniform(-12, 12), world.HEIGHT / 2 + rng.uniform(-7, 7))
    motion = motions[rng.choice(len(motions), p=MOTION_SHARES)]
    return world.Scene(
        shape=shapes[rng.choice(len(shapes), p=SHAPE_SHARES)],
        colour=colours[rng.integers(len(colours))],
        background=list(world.BACKGROUNDS.values())[rng.integers(3)],
        radius=float(rng.uniform(8, 12)),
        path=world.motion_path(motion, middle, float(rng.uniform(12, 26)), world.FRAMES),
    )
