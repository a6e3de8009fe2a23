"""A film of several clips, one after the other, with a chapter for each."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal

import numpy as np

from lib.cancellation import check_stop
from lib.errors import UserError
from lib.video.reader import OpenVideo, open_video
from lib.video.writer import write_video

Transition = Literal["cut", "crossfade"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FilmClip:
    """A clip of a film."""

    path: Path
    title: str
    """Its chapter's."""


def write_film(
    clips: Sequence[FilmClip],
    path: Path,
    *,
    transition: Transition,
    seconds: float,
    metadata: dict[str, str],
    stop: Event | None = None,
) -> Path:
    """Write clips as one H.264 film, in the size and rate of the first, and return its path.

    Clips of other sizes are scaled. A chapter begins where its clip does, with crossfade where it begins to
    show.

    Args:
        seconds: How long one clip fades into the next, with crossfade. At least one frame of each clip is
            shown alone.

    Raises:
        UserError: A clip cannot be read or is too short for the crossfade.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(open_video(clip.path, stop=stop)) for clip in clips]
        first = opened[0].info
        overlap = round(seconds * first.fps) if transition == "crossfade" else 0
        lengths = [video.info.frames for video in opened]
        if overlap and len(clips) > 1:
            _check_lengths(lengths, overlap, first.fps)
        starts = [sum(lengths[:place]) - place * overlap for place in range(len(clips))]
        return write_video(
            _frames(opened, overlap, stop),
            path,
            fps=first.fps,
            format="mp4",
            metadata=metadata,
            chapters=[(start, clip.title) for start, clip in zip(starts, clips, strict=True)],
        )


def _check_lengths(lengths: list[int], overlap: int, fps: float) -> None:
    for number, length in enumerate(lengths, start=1):
        fades = 1 if number in (1, len(lengths)) else 2
        if length <= fades * overlap:
            longest = (length - 1) // fades / fps
            raise UserError(
                f"transition_seconds={overlap / fps:g} is too long for scene {number}, which has "
                f"{length / fps:g} s: use at most {int(longest * 100) / 100:g}, or transition=cut."
            )


def _frames(videos: list[OpenVideo], overlap: int, stop: Event | None) -> Iterator[np.ndarray]:
    """Yield the frames of all clips; the last `overlap` ones of each are mixed with the next one's first."""
    size = (videos[0].info.width, videos[0].info.height)
    waiting: deque[np.ndarray] = deque()
    for place, video in enumerate(videos):
        fading, waiting = waiting, deque()
        is_last = place + 1 == len(videos)
        for frame in video.read(range(video.info.frames), size=size):
            check_stop(stop)
            if fading:
                share = (overlap - len(fading) + 1) / (overlap + 1)
                frame = np.rint(fading.popleft() * (1 - share) + frame * share).astype(np.uint8)
            waiting.append(frame)
            if is_last or len(waiting) > overlap:
                yield waiting.popleft()
    yield from waiting
