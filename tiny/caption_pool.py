"""The clips that tiny-caption learns from: compressed as people's are, through the VAE, of tiny-t2v."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch

from lib.caption.inputs import MEAN, STD, pixel_values
from tiny import loop, world
from tiny.judge import judge

EMBEDDED = Path(__file__).resolve().parent.parent / "weights" / "tiny-t2v"
FRAMES = 12
"""Of the rendered clips; those through the VAE and of tiny-t2v have 9."""
RENDERED, DECODED, GENERATED = 20, 3, 3
"""Clips of each trained combination."""
RATIOS, RATIO_SHARES = (4 / 3, 1.0, 16 / 9, 3 / 4), (0.55, 0.15, 0.2, 0.1)
LATENT_NOISE = 0.3
BATCH = 6


@dataclass(kw_only=True, slots=True)
class CaptionPool:
    """N clips as the model's preprocessing leaves them."""

    frames: torch.Tensor
    """uint8 [N, FRAMES, S, S, 3]; of shorter clips the rest is empty."""
    length: torch.Tensor
    """Frames of each, [N]."""
    combination: torch.Tensor
    """Index into world.TRAINED_COMBINATIONS, [N]."""


def build_caption_pool(worker: loop.Worker, path: Path, *, size: int, seed: int) -> CaptionPool:
    """This worker's share of the clips, cached at `path`."""
    if stored := loop.load_checkpoint(path):
        return CaptionPool(**stored)
    rng = worker.rng(seed, 10**6)
    frames, lengths, combinations = [], [], []
    sources = ((RENDERED, _compressed), (DECODED, _decoded), (GENERATED, _generated))
    for count, make in sources:
        order = np.repeat(np.arange(len(world.TRAINED_COMBINATIONS)), count)[worker.rank :: worker.count]
        rng.shuffle(order)
        for index, clip in make(order, rng):
            prepared = np.zeros((FRAMES, size, size, 3), np.uint8)
            for slot, frame in zip(prepared, clip, strict=False):
                slot[...] = _as_seen(frame, size)
            frames.append(prepared)
            lengths.append(len(clip))
            combinations.append(int(index))
        if worker.is_main:
            print(f"pool: {len(frames)} clips", flush=True)
    stored = {
        "frames": torch.from_numpy(np.stack(frames)),
        "length": torch.tensor(lengths),
        "combination": torch.tensor(combinations),
    }
    loop.save_checkpoint(path, **stored)
    return CaptionPool(**stored)


def normalised(frames: torch.Tensor) -> torch.Tensor:
    """Pixel values [..., 3, S, S] of a pool's frames [..., S, S, 3]."""
    return ((frames.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).movedim(-1, -3)


def compress(frames: np.ndarray, *, quality: int) -> np.ndarray:
    """Frames [T, H, W, 3] with even sides after H.264 at 4:2:0; quality is the constant rate factor."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast", "crf": str(quality)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _as_seen(frame: np.ndarray, size: int) -> np.ndarray:
    values = pixel_values(frame[None], size)[0].movedim(0, -1) * torch.tensor(STD) + torch.tensor(MEAN)
    return (values * 255).round().clamp(0, 255).byte().numpy()


def _scene(combination: int, rng: np.random.Generator, frames: int) -> world.Scene:
    return world.sample_scene(
        world.TRAINED_COMBINATIONS[combination],
        rng,
        from_start=bool(rng.random() < 0.3),
        frames=frames,
        radius=float(rng.uniform(8, 12)),
    )


def _compressed(order: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    for index in order:
        height = 2 * int(np.exp(rng.uniform(np.log(20), np.log(80))))
        width = 2 * round(height * rng.choice(RATIOS, p=RATIO_SHARES) / 2)
        clip = world.render(_scene(index, rng, FRAMES), height, width)
        yield index, compress(clip, quality=int(rng.integers(15, 36)))


@torch.no_grad()
def _decoded(order: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    from diffusers import AutoencoderKLCogVideoX

    from tiny.train_vae import to_tensor

    vae = AutoencoderKLCogVideoX.from_pretrained(EMBEDDED / "vae", dtype=torch.float32, local_files_only=True)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        video = to_tensor([world.render(_scene(index, rng, world.FRAMES)) for index in chosen])
        torch.manual_seed(int(rng.integers(2**62)))
        latents = vae.encode(video).latent_dist.sample()
        level = LATENT_NOISE * torch.rand(len(chosen), 1, 1, 1, 1)
        latents = latents + level * latents.std() * torch.randn_like(latents)
        decoded = vae.decode(latents).sample.movedim(1, -1)
        yield from zip(chosen, _as_bytes((decoded + 1) / 2), strict=True)


@torch.no_grad()
def _generated(order: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    """What tiny-t2v makes of canonical captions, where the judge sees in it what was asked for."""
    from diffusers import CogVideoXPipeline

    from lib.models.specs import SPECS
    from tiny.captions import canonical_caption

    spec = SPECS["tiny-t2v"]
    pipeline = CogVideoXPipeline.from_pretrained(EMBEDDED, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(order), BATCH):
        chosen = [world.TRAINED_COMBINATIONS[index] for index in order[start : start + BATCH]]
        videos = pipeline(
            prompt=[canonical_caption(attributes) for attributes in chosen],
            num_inference_steps=int(rng.integers(15, 31)),
            guidance_scale=float(rng.uniform(3, 7)),
            height=spec.height,
            width=spec.width,
            num_frames=spec.frames,
            max_sequence_length=spec.text_tokens,
            generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
            output_type="np",
        ).frames
        for index, attributes, video in zip(order[start : start + BATCH], chosen, videos, strict=True):
            clip = np.rint(video * 255).astype(np.uint8)
            if all(judge(clip).agreement(attributes).values()):
                yield index, clip


def _as_bytes(clips: torch.Tensor) -> np.ndarray:
    return (clips.clamp(0, 1) * 255).round().byte().numpy()
