"""Latents, first frames and prompt embeddings, encoded once and cached on disk.

Each sample is a file with mean and standard deviation of the VAE's posterior, so that every step draws fresh
latents, and the first frame, to which every step adds fresh noise. A file's name is a digest of everything
that changes its content. The cache is shared by all runs and bounded in bytes; the least recently used files
are removed first.
"""

import contextlib
import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lib.cancellation import check_stop
from lib.datasets.clips import Clip, LeftOut
from lib.errors import UserError
from lib.network.download import sha256_of
from lib.progress import Report, progress_line
from lib.settings import current
from lib.storage.disk import replacing
from lib.text_limits import READ
from training.adapter import save_tensors
from training.clips import Sample, Sampling, clip_samples
from training.config import digest

DECODING_SECONDS = 600.0
"""Time limit for one clip; every frame is decoded, and a clip may last twenty minutes."""
FORMAT = 1
"""Incremented when the meaning of cached files changes."""
PIECES, PIECE_BYTES = 64, 1 << 16
STALE_SECONDS = 86_400
"""The process that writes a partial file as old as this is gone."""


@dataclass(frozen=True, slots=True)
class Section:
    """One training sample: a section of a clip, encoded once for each crop and side."""

    clip: str
    caption: str
    frames: int
    files: tuple[tuple[Path, ...], ...]
    """Files by side (as it is, mirrored), then by crop."""


class LatentCache:
    """A folder of safetensors files named by digests; any number of processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes = current().latents_bytes

    def path(self, *parts: object, suffix: str = ".safetensors") -> Path:
        """Return the path of the file that these parts identify."""
        return self.folder / f"{digest([FORMAT, *parts])}{suffix}"

    def write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write a file in one step."""
        with _replacing(path) as partial:
            save_tensors({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)

    def contains(self, path: Path) -> bool:
        """Return whether a file is present and complete, and mark it as used."""
        try:
            with safe_open(path, "pt"):  # reads the header, which says how long the file is
                _mark_used(path)
        except (OSError, SafetensorError):
            return False
        return True

    def read(self, path: Path) -> dict[str, torch.Tensor]:
        """Read a file's tensors. Raises UserError when the file was removed since the run began."""
        try:
            _mark_used(path)
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} can no longer be read: {error}. Start again: missing files are encoded again."
            ) from error

    def write_json(self, path: Path, content: object) -> None:
        """Write a JSON file in one step."""
        with _replacing(path) as partial:
            partial.write_text(json.dumps(content))

    def trim(self, keep: set[Path]) -> None:
        """Remove the least recently used files until the rest fits; those in `keep` stay."""
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process trims too
                used, size = path.stat().st_mtime, path.stat().st_size
                if path.suffix == ".partial" and used < time.time() - STALE_SECONDS:
                    path.unlink()
                else:
                    files.append((used, size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            if path not in keep:
                path.unlink(missing_ok=True)
                total -= size


def _replacing(path: Path) -> AbstractContextManager[Path]:
    """Return `replacing` with a name of this process's own: others may write the same file."""
    return replacing(path, partial=path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial"))


def model_digest(folder: Path) -> str:
    """Return a digest of a component's configs and weights; of a large file, evenly spread pieces count."""
    parts: list[object] = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        size = path.stat().st_size
        seen = hashlib.sha256()
        with path.open("rb") as file:
            if size <= PIECES * PIECE_BYTES:
                seen.update(file.read())
            else:
                for place in np.linspace(0, size - PIECE_BYTES, PIECES).astype(int):
                    file.seek(place)
                    seen.update(file.read(PIECE_BYTES))
        parts.append([path.name, size, seen.hexdigest()])
    return digest(parts)


class Encodings:
    """Samples and prompts of one run, read from the cache a few at a time."""

    def __init__(self, cache: LatentCache, *, text_key: str) -> None:
        self.cache = cache
        self._text_key = text_key

    def prompt_path(self, prompt: str) -> Path:
        """Return where a prompt's embeddings are cached."""
        return self.cache.path("prompt", self._text_key, prompt)

    def prompt(self, text: str) -> torch.Tensor:
        """Return the embeddings [tokens, width] of an encoded prompt."""
        return self.cache.read(self.prompt_path(text))["embeddings"]

    def sample(self, section: Section, *, flipped: bool, crop: int) -> dict[str, torch.Tensor]:
        """Return `mean` and `std` [f, C, h, w], unscaled, and `image` uint8 [3, 1, H, W]."""
        return self.cache.read(section.files[int(flipped)][crop])


@torch.inference_mode()
def encode_prompts(
    prompts: Sequence[str], encodings: Encodings, *, load: Callable[[], tuple[Any, Any]], tokens: int,
    device: str, report: Report, stop: threading.Event | None,
) -> None:  # fmt: skip
    """Encode the prompts that are not cached, as the pipelines do: padded or cut to `tokens`, without a mask.

    `load` returns tokenizer and text encoder, and is called only when needed. Raises Stopped.
    """
    cache = encodings.cache
    missing = [text for text in dict.fromkeys(prompts) if not cache.contains(encodings.prompt_path(text))]
    if not missing:
        return
    tokenizer, encoder = load()
    for done, text in enumerate(missing):
        check_stop(stop)
        read = text[:READ]
        ids = tokenizer(
            read, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
        ).input_ids
        length = len(tokenizer(read).input_ids)
        if length > tokens:
            report(f"a caption has {length} tokens, the base reads the first {tokens}: {text[:60]!r} ...")
        embeddings = encoder(ids.to(device))[0][0]
        cache.write(encodings.prompt_path(text), {"embeddings": embeddings})
        report(progress_line("encoding captions", done + 1, len(missing)))


@torch.inference_mode()
def encode_clip(
    clip: Clip, sampling: Sampling, cache: LatentCache, *, vae: Callable[[], AutoencoderKLCogVideoX],
    vae_key: str, images: bool, stop: threading.Event | None,
) -> list[Section] | LeftOut:  # fmt: skip
    """Return the clip's sections, encoded unless they are cached, or why the clip cannot be used.

    With `images` the first frame is stored too (image to video). `vae` loads the model when it is first
    needed. Raises Stopped.
    """
    content = sha256_of(clip.path, stop=stop)
    if sampling.fit == "random":  # each clip has its own crops, the same ones in every run
        sampling = replace(sampling, seed=int(content[:8], 16))
    key = [content, asdict(sampling), vae_key, images]
    index = cache.path("clip", *key, suffix=".json")
    found = _read_index(cache, index)
    if found is None:
        found = []
        samples = clip_samples(clip.path, sampling, timeout=DECODING_SECONDS)
        while True:
            try:  # only around reading: a full disk is not a reason to leave the clip out
                sample: Sample | None = next(samples, None)
            except UserError as error:
                return LeftOut(name=clip.name, reason=str(error))
            if sample is None:
                break
            check_stop(stop)
            path = cache.path("sample", *key, sample.section, sample.crop, sample.flipped)
            cache.write(path, _encode(vae(), sample.frames, images=images))
            found.append([sample.section, int(sample.flipped), sample.crop, len(sample.frames), path.name])
        cache.write_json(index, found)
    return _sections(clip, found, cache)


def _encode(vae: AutoencoderKLCogVideoX, frames: np.ndarray, *, images: bool) -> dict[str, torch.Tensor]:
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)  # [3, F, H, W], uint8
    mean, std = posterior(vae, pixels(video[None], vae))
    return {"mean": mean[0], "std": std[0]} | ({"image": video[:, :1]} if images else {})


def posterior(vae: AutoencoderKLCogVideoX, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode [B, 3, F, H, W] to mean and standard deviation, [B, f, C, h, w], unscaled."""
    encoded: Any = vae.encode(video)
    return encoded.latent_dist.mean.transpose(1, 2), encoded.latent_dist.std.transpose(1, 2)


def pixels(video: torch.Tensor, vae: AutoencoderKLCogVideoX) -> torch.Tensor:
    """Convert uint8 [B, 3, F, H, W] to -1..1 on the VAE's device, in its type."""
    return (video.to(vae.device).float() / 127.5 - 1).to(vae.dtype)


def _read_index(cache: LatentCache, index: Path) -> list[list] | None:
    """Return the clip's samples if every file is present and complete."""
    try:
        rows = json.loads(index.read_text())
        _mark_used(index)
    except (OSError, ValueError):
        return None
    return rows if all(cache.contains(cache.folder / row[-1]) for row in rows) else None


def _mark_used(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # another user's, who shares the cache
        os.utime(path)


def _sections(clip: Clip, rows: list[list], cache: LatentCache) -> list[Section]:
    files: dict[int, dict[tuple[int, int], Path]] = {}
    frames: dict[int, int] = {}
    for section, side, crop, count, name in rows:
        files.setdefault(section, {})[side, crop] = cache.folder / name
        frames[section] = count
    return [
        Section(
            clip=clip.name,
            caption=clip.caption,
            frames=frames[section],
            files=tuple(
                tuple(path for (s, _), path in sorted(variants.items()) if s == side)
                for side in sorted({side for side, _ in variants})
            ),
        )
        for section, variants in sorted(files.items())
    ]
