"""Training transformer and text encoder together, then, from those weights, the image-to-video transformer.

What made it work: cached latents of thousands of clips; one caption template first, paraphrases later; more
timesteps with high noise and more weight on the foreground at first, both fading to the plain objective.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn

from tiny import loop, world
from tiny.captions import canonical_caption, sample_caption
from tiny.networks import (
    HEAD_DIM,
    LATENT_CHANNELS,
    PATCH,
    SCHEDULER,
    build_text_encoder,
    build_transformer,
    build_vae,
    latent_shape,
)
from tiny.pool import Pool, build_pool
from tiny.tokenizer import build_tokenizer, encode
from training.objective import project_in_float32

BATCH = 64  # over all processes
CAPTION_DROPOUT = 0.1
FOREGROUND_WEIGHT = 4.0
PEAK_RATE = {"t2v": 1.5e-3, "i2v": 4e-4}
PER_COMBINATION = {"t2v": 32, "i2v": 32}


class TextToLatents(nn.Module):
    """Text encoder and transformer in one module, so that they share optimizer, average and checkpoint."""

    def __init__(self, vocabulary: int, task: str) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocabulary)
        self.transformer = build_transformer(LATENT_CHANNELS * (2 if task == "i2v" else 1))
        frames, _, height, width = latent_shape()
        grid = (height // PATCH, width // PATCH)
        project_in_float32(self.transformer.patch_embed.proj)
        self.rotary = get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), grid), grid, frames)

    def forward(self, latents: torch.Tensor, ids: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        text = self.text_encoder(ids).last_hidden_state
        rotary = tuple(table.to(latents.device) for table in self.rotary)
        return self.transformer(latents, text, timesteps, image_rotary_emb=rotary, return_dict=False)[0]


def train_transformer(worker: loop.Worker, folder: Path, task: str, steps: int, seed: int) -> None:
    """Train one task for `steps`, resuming from folder/{task}.pt; needs folder/vae.pt (i2v: also t2v.pt)."""
    torch.manual_seed(seed)
    vae = build_vae().to(worker.device).eval().requires_grad_(False)
    vae_state = loop.load_checkpoint(folder / "vae.pt")
    vae.load_state_dict(vae_state["average"])
    pool = build_pool(
        vae,
        worker,
        folder / f"pool-{task}-{vae_state['step']}-{worker.rank}-of-{worker.count}.pt",
        per_combination=PER_COMBINATION[task],
        images=task == "i2v",
        seed=seed,
    )
    tokenizer = build_tokenizer()
    model = TextToLatents(len(tokenizer), task)
    checkpoint, start = folder / f"{task}.pt", 0
    state = loop.load_checkpoint(checkpoint)
    if state is None and task == "i2v":
        model.load_state_dict(_widened(loop.load_checkpoint(folder / "t2v.pt")["average"]))
    if task == "i2v":
        model.text_encoder.requires_grad_(False)
    model.to(worker.device)
    average = loop.Average(model, 0.9985)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    factor = worker.mean(pool.scaling_factor())
    if state:
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, factor = state["step"], state["scaling_factor"]
        if state.get("steps", steps) != steps:
            raise SystemExit(
                f"{checkpoint} was started with {state['steps']} steps in all; give the same number."
            )
    elif task == "i2v":
        factor = loop.load_checkpoint(folder / "t2v.pt")["scaling_factor"]
    alphas = CogVideoXDDIMScheduler(**SCHEDULER).alphas_cumprod.float()
    log, losses = loop.Log(folder / f"{task}.jsonl", worker), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(step, steps, peak=PEAK_RATE[task])
        batch = _Batch(pool, worker, alphas, factor, task=task, progress=step / steps, seed=seed, step=step)
        with loop.autocast(worker.device), loop.attention_in_fp32():
            predicted = model(
                batch.inputs, encode(tokenizer, batch.captions).to(worker.device), batch.timesteps
            )
        loss = (batch.weight * (predicted.float() - batch.target) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        worker.average_gradients(model)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update(model, step)
        losses.append(float(loss.detach()))
        last = step + 1 == steps
        if worker.is_main and ((step + 1) % 500 == 0 or last):
            log(
                step=step + 1,
                loss=float(np.mean(losses[-500:])),
                **_text_use(average.module, pool, alphas, factor, task),
            )
            loop.save_checkpoint(
                checkpoint,
                model=model.state_dict(),
                average=average.module.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                steps=steps,
                scaling_factor=factor,
            )


class _Batch:
    """Sample noised latents, v targets, loss weights and captions of a step from seed and step."""

    def __init__(
        self, pool: Pool, worker: loop.Worker, alphas: torch.Tensor, factor: float, *,
        task: str, progress: float, seed: int, step: int,
    ) -> None:  # fmt: skip
        rng, generator = worker.rng(seed, step), worker.torch_generator(seed, step)
        size = BATCH // worker.count
        chosen = torch.from_numpy(rng.integers(0, len(pool.mean), size))
        clean = _sample(pool.mean, pool.std, chosen, generator) * factor
        share = (0.5 if task == "t2v" else 0.3) * (1 - progress) + 0.1
        noisy = torch.from_numpy(rng.random(size) < share)
        timesteps = torch.from_numpy(rng.integers(0, 1000, size))
        timesteps = torch.where(noisy, 850 + timesteps * 150 // 1000, timesteps)
        noised, target = _noise(clean, timesteps, alphas, generator)
        if task == "i2v":
            image = _sample(pool.image_mean, pool.image_std, chosen, generator) * factor
            noised = torch.cat(
                [noised, nn.functional.pad(image, (0, 0) * 3 + (0, clean.shape[1] - 1))], dim=2
            )
        weight = 1 + FOREGROUND_WEIGHT * (1 - progress) * pool.mask[chosen].float()
        variety = 0.0 if progress < 0.2 and task == "t2v" else min(0.8, 1.6 * progress + 0.1)
        self.captions = [
            "" if rng.random() < CAPTION_DROPOUT
            else sample_caption(world.TRAINED_COMBINATIONS[i], rng, variety)
            for i in pool.combination[chosen]
        ]  # fmt: skip
        device = worker.device
        self.inputs, self.target = noised.to(device), target.to(device)
        self.weight, self.timesteps = (weight / weight.mean()).to(device), timesteps.to(device)


def _sample(mean: torch.Tensor, std: torch.Tensor, chosen: torch.Tensor, generator) -> torch.Tensor:
    mean = mean[chosen].float()
    return mean + std[chosen].float() * torch.randn(mean.shape, generator=generator)


def _noise(
    clean: torch.Tensor, timesteps: torch.Tensor, alphas: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randn(clean.shape, generator=generator)
    signal = alphas[timesteps].sqrt().view(-1, 1, 1, 1, 1)
    deviation = (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1, 1)
    return signal * clean + deviation * noise, signal * noise - deviation * clean


def _widened(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return text-to-video weights with image channels initialized to zero."""
    name = "transformer.patch_embed.proj.weight"
    return state | {name: torch.cat([state[name], torch.zeros_like(state[name])], dim=1)}


@torch.no_grad()
def _text_use(model: TextToLatents, pool: Pool, alphas: torch.Tensor, factor: float, task: str) -> dict:
    """Return how much the loss at nearly pure noise grows if one word of the caption is wrong."""
    tokenizer, generator = build_tokenizer(), torch.Generator().manual_seed(1)
    chosen = torch.randint(0, len(pool.mean), (64,), generator=generator)
    device = next(model.parameters()).device
    clean = _sample(pool.mean, pool.std, chosen, generator) * factor
    noised, target = _noise(clean, torch.full((64,), 960), alphas, generator)
    if task == "i2v":
        image = _sample(pool.image_mean, pool.image_std, chosen, generator) * factor
        noised = torch.cat([noised, nn.functional.pad(image, (0, 0) * 3 + (0, clean.shape[1] - 1))], dim=2)
    right = [canonical_caption(world.TRAINED_COMBINATIONS[i]) for i in pool.combination[chosen]]

    def error(captions: list[str]) -> float:
        ids = encode(tokenizer, captions).to(device)
        predicted = model(noised.to(device), ids, torch.full((64,), 960, device=device))
        return float(((predicted - target.to(device)) ** 2).mean())

    base = error(right)
    words = {"shape": world.SHAPES, "colour": tuple(world.COLOURS), "motion": ("left", "right", "up", "down")}
    return {f"wrong_{k}": error([_swap(c, v) for c in right]) / base for k, v in words.items()}


def _swap(caption: str, words: tuple[str, ...]) -> str:
    for index, word in enumerate(words):
        if f" {word} " in f" {caption} ":
            return caption.replace(word, words[(index + 1) % len(words)])
    return caption
