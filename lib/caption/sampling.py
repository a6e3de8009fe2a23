"""Which frames of a clip the model sees: at most 24, in order, none twice."""

from typing import Literal

import numpy as np

FrameSampling = Literal["auto", "chat", "base", "uniform"]
MAX_FRAMES = 24
BASE_SECONDS = 60.0
AUTO_SECONDS = (2.0, 24.0)
"""Clips that one frame a second covers, with more than one or two."""


def choose_frames(
    timestamps: np.ndarray, *, fps: float, duration: float, sampling: FrameSampling
) -> tuple[list[int], Literal["chat", "base", "uniform"]]:
    """Indices of the frames, and the sampling that chose them (of auto, which).

    timestamps is float64 [T], seconds from the first frame; fps the mean rate; duration in seconds.
    chat: the frame nearest to each whole second, the first 24 of them. base: 24 evenly over the first 60
    seconds. uniform: 24 evenly over the whole clip. auto: chat for clips of 2 to 24 seconds, for which one
    frame a second is enough and cheap, uniform for shorter and longer ones.
    """
    if sampling == "auto":
        shortest, longest = AUTO_SECONDS
        sampling = "chat" if shortest <= duration <= longest else "uniform"
    count = len(timestamps)
    if sampling == "chat":
        seconds = range(min(round(float(timestamps.max())) + 1, MAX_FRAMES))
        chosen = [int(np.abs(timestamps - second).argmin()) for second in seconds]
    elif sampling == "base":
        end = min(count, int(BASE_SECONDS * fps)) if fps > 0 else count
        chosen = np.linspace(0, max(end, 1) - 1, MAX_FRAMES, dtype=int).tolist()
    else:
        chosen = np.rint(np.linspace(0, count - 1, min(MAX_FRAMES, count))).astype(int).tolist()
    return sorted(set(chosen)), sampling
