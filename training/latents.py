"""What the frozen models say about the data, computed once and kept on disk: latents, first frames, prompts.

One file a sample: mean and deviation of the VAE's posterior, so that every step draws fresh latents, and the
first frame, to which every step adds fresh noise. A file's name is a digest of everything that changes its
content. The cache is shared by all runs and bounded in bytes; what was not used for longest goes first.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lib.datasets.clips import Clip, LeftOut
from lib.errors import UserError
from lib.storage.disk import disk_error
from training.adapter import save_tensors
from training.clips import Sample, Sampling, clip_samples
from training.config import digest

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX

DEFAULT_CACHE_GB = 200.0
DECODING_SECONDS = 600.0
"""For one clip: every frame of it is decoded, of twenty minutes too."""
FORMAT = 1
"""Raised when the meaning of cached files changes."""
PIECES, PIECE_BYTES = 64, 1 << 16
STALE_SECONDS = 86_400
"""A file half written for longer than a day is nobody's any more."""


@dataclass(frozen=True, slots=True)
class Section:
    """One training sample: a stretch of a clip, encoded once for each crop and side."""

    clip: str
    caption: str
    frames: int
    files: tuple[tuple[Path, ...], ...]
    """By side (as it is, mirrored) and crop."""


class LatentCache:
    """A folder of safetensors files named by digests; any number of processes may share it.

    Raises UserError for a COGVIDEOX_LATENTS_GB that is no size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes = _bound()

    def path(self, *parts: object, suffix: str = ".safetensors") -> Path:
        return self.folder / f"{digest([FORMAT, *parts])}{suffix}"

    def write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Whole or not at all."""
        with _renamed_to(path) as partial:
            save_tensors({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial)

    def holds(self, path: Path) -> bool:
        """Whether a file is there and whole; asking counts as use."""
        try:
            with safe_open(path, "pt"):  # reads the header, which says how long the file is
                _mark_used(path)
        except (OSError, SafetensorError):
            return False
        return True

    def read(self, path: Path) -> dict[str, torch.Tensor]:
        """Raises UserError when the file went away since the run began."""
        try:
            _mark_used(path)
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read any more: {error}. Start again: what is missing is encoded anew."
            ) from error

    def write_json(self, path: Path, content: object) -> None:
        with _renamed_to(path) as partial:
            partial.write_text(json.dumps(content))

    def trim(self, keep: set[Path]) -> None:
        """Remove the files that were not used for longest until the rest fits; those in `keep` stay."""
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


@contextlib.contextmanager
def _renamed_to(path: Path) -> Iterator[Path]:
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        partial.unlink(missing_ok=True)


def model_digest(folder: Path) -> str:
    """A digest of a component's configurations and weights; of large weights, of pieces all over them."""
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
        return self.cache.path("prompt", self._text_key, prompt)

    def prompt(self, text: str) -> torch.Tensor:
        """Embeddings [tokens, width] of a prompt that was encoded."""
        return self.cache.read(self.prompt_path(text))["embeddings"]

    def sample(self, section: Section, *, flipped: bool, crop: int) -> dict[str, torch.Tensor]:
        """`mean` and `std` [f, C, h, w], unscaled, and `image` uint8 [3, 1, H, W]."""
        return self.cache.read(section.files[int(flipped)][crop])


@torch.inference_mode()
def encode_prompts(
    prompts: Sequence[str], encodings: Encodings, *, load: Callable[[], tuple[Any, Any]], tokens: int,
    device: str, report: Callable[[str], None], check: Callable[[], None],
) -> None:  # fmt: skip
    """Encode the prompts that the cache lacks. `load` gives tokenizer and text encoder, only when needed.

    As the pipelines do: padded to `tokens`, cut there, no attention mask.
    """
    cache = encodings.cache
    missing = [text for text in dict.fromkeys(prompts) if not cache.holds(encodings.prompt_path(text))]
    if not missing:
        return
    tokenizer, encoder = load()
    for done, text in enumerate(missing):
        check()
        ids = tokenizer(
            text, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
        ).input_ids
        whole = len(tokenizer(text).input_ids)
        if whole > tokens:
            report(f"a caption has {whole} tokens, the base reads the first {tokens}: {text[:60]!r} ...")
        embeddings = encoder(ids.to(device))[0][0]
        cache.write(encodings.prompt_path(text), {"embeddings": embeddings})
        report(f"progress: encoding captions {done + 1}/{len(missing)}")


@torch.inference_mode()
def encode_clip(
    clip: Clip, sampling: Sampling, cache: LatentCache, *, vae: Callable[[], "AutoencoderKLCogVideoX"],
    vae_key: str, images: bool, check: Callable[[], None],
) -> list[Section] | LeftOut:  # fmt: skip
    """The clip's sections, encoded unless the cache has them; or why it cannot be used.

    `images`: keep the first frame too (image to video). `vae` loads the model when it is first needed.
    """
    content = _content_digest(clip.path)
    if sampling.fit == "random":  # each clip is cut at places of its own, the same in every run
        sampling = replace(sampling, seed=int(content[:8], 16))
    key = [content, asdict(sampling), vae_key, images]
    index = cache.path("clip", *key, suffix=".json")
    found = _read_index(cache, index)
    if found is None:
        found = []
        samples = clip_samples(clip.path, sampling, timeout=DECODING_SECONDS)
        while True:
            try:
                sample: Sample | None = next(samples, None)
            except UserError as error:  # of the clip; that of a full disk is no reason to leave it out
                return LeftOut(name=clip.name, reason=str(error))
            if sample is None:
                break
            check()
            path = cache.path("sample", *key, sample.section, sample.crop, sample.flipped)
            cache.write(path, _encode(vae(), sample.frames, images=images))
            found.append([sample.section, int(sample.flipped), sample.crop, len(sample.frames), path.name])
        cache.write_json(index, found)
    return _sections(clip, found, cache)


def _encode(vae: "AutoencoderKLCogVideoX", frames: np.ndarray, *, images: bool) -> dict[str, torch.Tensor]:
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)  # [3, F, H, W], uint8
    posterior = vae.encode(pixels(video[None], vae)).latent_dist
    found = {"mean": posterior.mean[0].transpose(0, 1), "std": posterior.std[0].transpose(0, 1)}
    return found | ({"image": video[:, :1]} if images else {})


def pixels(video: torch.Tensor, vae: "AutoencoderKLCogVideoX") -> torch.Tensor:
    """uint8 [B, 3, F, H, W] -> -1..1 on the VAE's device in its type."""
    return (video.to(vae.device).float() / 127.5 - 1).to(vae.dtype)


def _content_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(cache: LatentCache, index: Path) -> list[list] | None:
    """The clip's samples where every file is there and whole."""
    try:
        rows = json.loads(index.read_text())
        _mark_used(index)
    except (OSError, ValueError):
        return None
    return rows if all(cache.holds(cache.folder / row[-1]) for row in rows) else None


def _mark_used(path: Path) -> None:
    """What was used last is trimmed last."""
    with contextlib.suppress(PermissionError):  # of another user, who shares the cache
        os.utime(path)


def _bound() -> float:
    """The cache's size in bytes: COGVIDEOX_LATENTS_GB."""
    text = os.environ.get("COGVIDEOX_LATENTS_GB") or str(DEFAULT_CACHE_GB)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text) * 1e9
    raise UserError(
        f"COGVIDEOX_LATENTS_GB={text} is not a size in GB above 0; empty means {DEFAULT_CACHE_GB:g}."
    )


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
