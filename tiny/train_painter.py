"""Training tiny-painter: its VAE on single frames, then text encoder and transformer by flow matching."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from tiny import loop, world
from tiny.judge import judge
from tiny.painter import (
    SHIFT,
    TEXT_LAYERS,
    TEXT_TOKENS,
    build_painter_scheduler,
    build_painter_tokenizer,
    build_painter_transformer,
    build_painter_vae,
    build_text_encoder,
    sample_frame,
    sample_image_prompt,
)

VAE_RATE = 2e-3
VAE_BATCH = 16
KL_WEIGHT = 1e-4
LATENT_NOISE = 0.2
"""Of the latents' deviation; without it small errors of a diffusion model show as speckles."""
PEAK_RATE = 1.5e-3
BATCH = 32
EMPTY = 0.1
"""Share of empty texts, for guidance."""
PLAIN_SHARE = 0.6
"""Share of the steps, at the start, with one form of text only: with many, shapes are not learned."""
FOREGROUND = 4.0
"""Additional weight of the patches that the shape covers."""
POOL = 120
"""Encoded frames of each shape, colour and ground."""
LOOKS = [a for a in world.ALL_COMBINATIONS if a.motion == "still"]


class Painter(nn.Module):
    """What is trained together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocabulary)
        self.transformer = build_painter_transformer()


def train_painter_vae(worker: loop.Worker, folder: Path, steps: int, seed: int) -> None:
    """Train for `steps`, resuming from folder/painter-vae.pt, with a checkpoint every 100 steps."""
    vae = build_painter_vae().to(worker.device)
    average = loop.Average(vae, 0.995)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint = folder / "painter-vae.pt"
    start = loop.resume(checkpoint, vae, average, optimizer, steps)
    log = loop.Log(folder / "painter-vae.jsonl", worker)
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(step, steps, peak=VAE_RATE)
        rng = worker.rng(seed, step)
        pictures = _to_tensor([_vae_picture(rng) for _ in range(VAE_BATCH // worker.count)]).to(worker.device)
        torch.manual_seed(int(rng.integers(2**62)))
        with loop.autocast(worker.device):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.sample()
            noise = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=worker.device)
            decoded = vae.decode(latents + noise * latents.detach().std() * torch.randn_like(latents)).sample
        differs = ((pictures - pictures[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
        weight = 1 + 3 * F.max_pool2d(differs, 5, stride=1, padding=2)
        error = decoded.float() - pictures
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = (weight / weight.mean() * (error.abs() + error**2)).mean() + KL_WEIGHT * kl
        _step(loss, vae, optimizer, worker)
        average.update(vae, step)
        last = step + 1 == steps
        if worker.is_main and ((step + 1) % 100 == 0 or last):
            log(
                step=step + 1,
                loss=float(loss.detach()),
                psnr=_psnr(error),
                **_reconstructions(average.module),
            )
            loop.save_training(checkpoint, vae, average, optimizer, step=step + 1, steps=steps)


def train_painter(worker: loop.Worker, folder: Path, steps: int, seed: int) -> None:
    """Train for `steps`, resuming from folder/painter.pt, with a checkpoint every 100 steps."""
    tokenizer = build_painter_tokenizer()
    painter = Painter(len(tokenizer)).to(worker.device)
    vae = load_painter_vae(folder).to(worker.device)
    pool = _pool(vae, worker, seed)
    average = loop.Average(painter, 0.997)
    optimizer = torch.optim.AdamW(
        painter.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    checkpoint = folder / "painter.pt"
    start = loop.resume(checkpoint, painter, average, optimizer, steps)
    log, losses = loop.Log(folder / "painter.jsonl", worker), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(step, steps, peak=PEAK_RATE)
        rng = worker.rng(seed, step)
        chosen = rng.integers(0, len(LOOKS), BATCH // worker.count)
        variety = 0.0 if step < PLAIN_SHARE * steps else 0.8
        texts = [
            "" if rng.random() < EMPTY else sample_image_prompt(LOOKS[int(look)], rng, variety)
            for look in chosen
        ]
        clean = pool[torch.from_numpy(chosen), torch.from_numpy(rng.integers(0, POOL, len(chosen)))].float()
        noise = torch.randn(clean.shape, generator=worker.torch_generator(seed + 1, step))
        position = torch.sigmoid(torch.randn(len(clean), generator=worker.torch_generator(seed + 2, step)))
        sigma = SHIFT * position / (1 + (SHIFT - 1) * position)
        mixed = (1 - sigma[:, None, None, None]) * clean + sigma[:, None, None, None] * noise
        with loop.autocast(worker.device), loop.attention_in_fp32():
            predicted = _predict(painter, tokenizer, mixed.to(worker.device), sigma.to(worker.device), texts)
        wanted = Flux2KleinPipeline._pack_latents(noise - clean).to(worker.device)
        covered = ((clean - clean[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.5).float()
        weight = Flux2KleinPipeline._pack_latents(1 + FOREGROUND * covered).to(worker.device)
        loss = (weight / weight.mean() * (predicted.float() - wanted) ** 2).mean()
        _step(loss, painter, optimizer, worker)
        average.update(painter, step)
        losses.append(float(loss.detach()))
        last = step + 1 == steps
        if worker.is_main and ((step + 1) % 100 == 0 or last):
            figures = {}
            if (step + 1) % 500 == 0 or last:
                figures = painted_right(painter_pipeline(average.module, vae, tokenizer), 45)
            log(step=step + 1, loss=float(np.mean(losses[-100:])), **figures)
            loop.save_training(checkpoint, painter, average, optimizer, step=step + 1, steps=steps)


def load_painter_vae(folder: Path) -> AutoencoderKLFlux2:
    """Return the trained VAE with the latents' statistics, with which the pipeline scales them."""
    state = loop.load_checkpoint(folder / "painter-vae.pt")
    if state is None:
        raise SystemExit("Train the painter's VAE first: script/tiny painter-vae.")
    vae = build_painter_vae()
    vae.load_state_dict(state["average"])
    vae.eval().requires_grad_(False)
    rng = np.random.default_rng(11)
    pictures = [sample_frame(look, rng) for look in LOOKS for _ in range(10)]
    latents = Flux2KleinPipeline._patchify_latents(vae.encode(_to_tensor(pictures)).latent_dist.sample())
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))
    return vae


def painter_pipeline(
    painter: Painter, vae: AutoencoderKLFlux2, tokenizer: Qwen2Tokenizer
) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline(
        scheduler=build_painter_scheduler(),
        vae=vae,
        text_encoder=painter.text_encoder,
        tokenizer=tokenizer,
        transformer=painter.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def painted_right(pipeline: Flux2KleinPipeline, count: int) -> dict[str, float]:
    """Return in which share of painted frames the judge sees what the text says."""
    rng, right = np.random.default_rng(10**6), []
    for place in range(count):
        look = LOOKS[place % len(LOOKS)]
        output = pipeline(
            prompt=sample_image_prompt(look, rng, 0.8), height=world.HEIGHT, width=world.WIDTH,
            num_inference_steps=20, max_sequence_length=TEXT_TOKENS, text_encoder_out_layers=TEXT_LAYERS,
            generator=torch.Generator().manual_seed(place), output_type="np",
        )  # fmt: skip
        frame = (output.images * 255).round().astype(np.uint8)
        right.append(judge(frame).agreement(look))
    names = ("shape", "colour", "background")
    shares = {name: float(np.mean([each[name] for each in right])) for name in names}
    return shares | {"right": float(np.mean([all(each[name] for name in names) for each in right]))}


def _predict(
    painter: Painter, tokenizer: Qwen2Tokenizer, latents: torch.Tensor, sigma: torch.Tensor, texts: list[str]
) -> torch.Tensor:
    embeds = encode_texts(painter.text_encoder, tokenizer, texts)
    return painter.transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(latents),
        timestep=sigma,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds).to(latents.device),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(latents).to(latents.device),
        return_dict=False,
    )[0]


def encode_texts(text_encoder: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, texts: list[str]) -> torch.Tensor:
    """Return what the pipeline gives the transformer for texts, with gradients."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in texts
    ]
    inputs = tokenizer(
        chats, return_tensors="pt", padding="max_length", truncation=True, max_length=TEXT_TOKENS
    ).to(text_encoder.device)
    states = text_encoder.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([states[layer] for layer in TEXT_LAYERS], dim=-1)


@torch.no_grad()
def _pool(vae: AutoencoderKLFlux2, worker: loop.Worker, seed: int) -> torch.Tensor:
    """Return patched and scaled latents of rendered frames, [looks, POOL, channels, height, width]."""
    rng = worker.rng(seed, 10**6)
    parts = []
    for look in LOOKS:
        pictures = _to_tensor([sample_frame(look, rng) for _ in range(POOL)]).to(worker.device)
        latents = Flux2KleinPipeline._patchify_latents(vae.encode(pictures).latent_dist.mode())
        mean, variance = (values.view(1, -1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
        parts.append(((latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)).cpu())
    return torch.stack(parts)


def _vae_picture(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        return sample_frame(LOOKS[int(rng.integers(len(LOOKS)))], rng)
    return world.render(world.sample_vae_scene(rng, 2))[0]


def _to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Convert uint8 pictures [height, width, 3] to float [batch, 3, height, width] in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _step(
    loss: torch.Tensor, module: nn.Module, optimizer: torch.optim.Optimizer, worker: loop.Worker
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    worker.average_gradients(module)
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def _reconstructions(vae: AutoencoderKLFlux2) -> dict[str, float]:
    """Return in which share of reconstructed frames shape, colour and ground are right."""
    rng = np.random.default_rng(9)
    pictures = [sample_frame(look, rng) for look in LOOKS[::1]]
    device = next(vae.parameters()).device
    decoded = vae.decode(vae.encode(_to_tensor(pictures).to(device)).latent_dist.mode()).sample
    frames = (
        ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    )
    right = [judge(frame[None]).agreement(look) for frame, look in zip(frames, LOOKS, strict=True)]
    return {
        name: float(np.mean([each[name] for each in right])) for name in ("shape", "colour", "background")
    }


def _psnr(error: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / error.detach().float().pow(2).mean().clamp(min=1e-10)))
