"""Complete clips in memory, for tests; the service reads frame by frame (lib/video/reader.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.video.reader import VideoInfo, open_video


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Decoded frames."""

    frames: np.ndarray
    """uint8 [T, H, W, 3], RGB."""
    fps: float
    """Mean frame rate of the file."""
    timestamps: np.ndarray
    """float64 [T], seconds from the file's first frame."""


def probe(path: str | Path) -> VideoInfo:
    """Return frame count, rate, size and duration."""
    with open_video(path) as video:
        return video.info


def decode(
    path: str | Path,
    *,
    indices: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    timeout: float = 60.0,
) -> Clip:
    """Decode the frames at `indices`, which increase (default: all), scaled to `size` (width, height)."""
    with open_video(path, timeout=timeout) as video:
        wanted = list(range(video.info.frames) if indices is None else indices)
        frames = np.stack(list(video.read(wanted, size=size)))
        return Clip(frames, video.info.fps, video.timestamps[wanted])
