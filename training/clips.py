"""One video file -> training samples: resampled to the base's rate, cut to its length, fitted to its size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lib.errors import UserError
from lib.video.reader import OpenVideo, VideoInfo, open_video

LONGEST_FRAMES = 10_000
"""Of one file at the base's rate, about 20 minutes at 8 fps: one caption does not describe more."""
LARGEST_CUT = 16
"""How many times as many pixels as a sample has a frame may have that covers it: beyond, next to nothing of
the picture would be left, and frames would be hundreds of times as wide as a sample."""
LARGEST_JITTER = 0.01
"""Seconds. Times that are this near to a constant rate are one, rounded by the container: to milliseconds in
Matroska, to centiseconds in a GIF."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How files become samples."""

    fps: float
    """Rate of the samples; the file's speed is kept."""
    frame_step: int
    """Samples have frame_step * N + 1 frames, N at least 1."""
    max_frames: int
    """And at most so many."""
    width: int
    """Of the samples, in pixels."""
    height: int
    """Of the samples, in pixels."""
    fit: Literal["center", "random", "none"]
    """center: cover the sample, cut both sides equally. random: cover it, cut at random. none: show all of
    the frame, black bars. Proportions are always kept."""
    random_crops: int
    """With `fit` random: how many crops of each section."""
    flip: bool
    """A mirrored variant of each sample too."""
    skip_frames_start: int
    """Frames of the file that are left out at its beginning."""
    skip_frames_end: int
    """Frames of the file that are left out at its end."""
    long_clips: Literal["split", "cut"]
    """What is longer than a sample becomes several that cover it, or ends after the first."""
    seed: int
    """Of the random crops."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One training sample in pixels."""

    frames: np.ndarray
    """uint8 [F, H, W, 3], RGB."""
    section: int
    """Which part of the file, from 0."""
    crop: int
    """Which of the random crops, from 0."""
    flipped: bool
    """Whether it is mirrored."""
    start: float
    """When its first frame is shown in the file, in seconds."""


def clip_samples(path: Path, sampling: Sampling, *, timeout: float = 120.0) -> Iterator[Sample]:
    """Yield every section x crop x side of a video, in that order of nesting.

    The file is decoded once, front to back; at most two sections are in memory, whatever its length. (With
    `fit` random they are kept as large as covers the sample.) `timeout` is how many seconds may be spent
    waiting for the decoder. Raises UserError when the file is no video, is damaged, too short or too long;
    where the damage is in the middle, after the samples before it.
    """
    with open_video(path, timeout=timeout) as video:
        times, duration = _times(video)
        parts = sections(times, duration, sampling)
        size = _scaled_size(video.info, sampling)
        box = _box(size, sampling)
        begun: dict[int, np.ndarray] = {}
        coming = 0
        # Every frame from the first, wanted or not: to leave some out the decoder seeks, and then it gives
        # wrong ones in H.264 without B-frames, WMV and MPEG program streams.
        last = max(int(part[-1]) for part in parts)
        for index, frame in enumerate(video.read(range(last + 1), size=size)):
            while coming < len(parts) and parts[coming][0] <= index:
                begun[coming] = np.zeros((len(parts[coming]), *box[::-1], 3), np.uint8)
                coming += 1
            for number in list(begun):
                part = parts[number]
                begun[number][part == index] = _placed(frame, box)
                if part[-1] == index:
                    yield from _variants(begun.pop(number), number, float(times[part[0]]), sampling)


def _times(video: OpenVideo) -> tuple[np.ndarray, float]:
    """When the file's frames begin to be shown, and the last one ends.

    MPEG program streams give rubbish for that, and a sound rate.
    """
    sound = np.isfinite(video.timestamps).all() and video.timestamps.min() >= 0
    if sound or video.info.fps <= 0:
        return video.timestamps, video.info.duration
    return np.arange(video.info.frames) / video.info.fps, video.info.frames / video.info.fps


def sections(timestamps: np.ndarray, duration: float, sampling: Sampling) -> list[np.ndarray]:
    """Which frames of the file make each section: for each an array of indices that do not decrease.

    `timestamps` [T] are the seconds at which the file's frames begin to be shown, `duration` is when the last
    one ends. What is not skipped has round(length * fps) frames at the sampling's rate, each the one shown at
    its time; where the file has fewer, frames repeat. A section has the most frames that the rule, the file
    and `max_frames` allow. Splitting, less than a quarter of a section may be left over at the end; otherwise
    sections are spread evenly from the first frame to the last, overlapping where they must.
    Raises UserError saying how many frames there are and how many are needed.
    """
    first, last = sampling.skip_frames_start, len(timestamps) - sampling.skip_frames_end
    if first >= last:
        raise UserError(
            f"too short: it has {_count(len(timestamps))}, and {first} at its start and "
            f"{sampling.skip_frames_end} at its end are skipped"
        )
    begin, end = timestamps[first], duration if last == len(timestamps) else timestamps[last]
    length = float(end - begin)
    if not (np.isfinite(timestamps).all() and math.isfinite(length)) or length <= 0:
        raise UserError("its frames have no times: convert it to mp4")
    count = round(length * sampling.fps)
    longest = (min(count, sampling.max_frames) - 1) // sampling.frame_step * sampling.frame_step + 1
    if longest <= 1:
        raise UserError(_too_short(last - first, length, count, sampling))
    starts = [0]
    if sampling.long_clips == "split":
        if count > LONGEST_FRAMES:
            raise UserError(
                f"too long: {length:.0f} s are {count:,} frames at {sampling.fps:g} fps, and one file may "
                f"have {LONGEST_FRAMES:,} ({LONGEST_FRAMES / sampling.fps:.0f} s): make several clips of it, "
                "each with its own caption, or use long_clips=cut"
            )
        if 4 * (count - longest) >= longest:
            starts = np.rint(np.linspace(0, count - longest, math.ceil(count / longest))).astype(int).tolist()
    shown_from = np.maximum.accumulate(timestamps[first:last])
    tolerance = _rounding(shown_from)
    return [
        first + _shown_at(begin + (start + np.arange(longest)) / sampling.fps + tolerance, shown_from)
        for start in starts
    ]


def _shown_at(times: np.ndarray, shown_from: np.ndarray) -> np.ndarray:
    return np.maximum(np.searchsorted(shown_from, times, side="right") - 1, 0)


def _rounding(timestamps: np.ndarray) -> float:
    """By how many seconds a frame's time may be rounded up: so much later is it looked for."""
    exact = 1e-6
    if len(timestamps) < 3:
        return exact
    constant = np.linspace(timestamps[0], timestamps[-1], len(timestamps))
    jitter = float(np.abs(timestamps - constant).max())
    # Twice, because the last time, which the constant rate is taken from, is rounded too.
    return exact + (2 * jitter if jitter <= LARGEST_JITTER else 0)


def _too_short(frames: int, length: float, count: int, sampling: Sampling) -> str:
    needed = sampling.frame_step + 1
    skipped = sampling.skip_frames_start + sampling.skip_frames_end
    after = f" after skipping {skipped}" if skipped else ""
    return (
        f"too short: {_count(frames)} in {length:.2f} s{after} make {count} at {sampling.fps:g} fps; "
        f"at least {needed} are needed ({needed / sampling.fps:.2f} s)"
    )


def _count(frames: int) -> str:
    return "1 frame" if frames == 1 else f"{frames} frames"


def _scaled_size(info: VideoInfo, sampling: Sampling) -> tuple[int, int]:
    """Width and height to decode at: the sample's in one direction, more (none: less) in the other."""
    ratios = sampling.width / info.width, sampling.height / info.height
    scale = min(ratios) if sampling.fit == "none" else max(ratios)
    width, height = max(1, round(info.width * scale)), max(1, round(info.height * scale))
    if sampling.fit != "none" and width * height > LARGEST_CUT * sampling.width * sampling.height:
        raise UserError(
            f"too narrow: {info.width}x{info.height} would lose more than {LARGEST_CUT - 1}/{LARGEST_CUT} of "
            f"its picture when cut to {sampling.width}x{sampling.height}: use video_reshape_mode=none"
        )
    return width, height


def _box(size: tuple[int, int], sampling: Sampling) -> tuple[int, int]:
    """Width and height in which frames are kept until a section is whole."""
    return size if sampling.fit == "random" else (sampling.width, sampling.height)


def _placed(frame: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """The frame in the middle of the box [H, W, 3], cut where it is larger and with black where smaller."""
    height, width, _ = frame.shape
    if (width, height) == box:
        return frame
    placed = np.zeros((box[1], box[0], 3), np.uint8)
    rows, columns = min(height, box[1]), min(width, box[0])
    top, left = (height - rows) // 2, (width - columns) // 2
    y, x = (box[1] - rows) // 2, (box[0] - columns) // 2
    placed[y : y + rows, x : x + columns] = frame[top : top + rows, left : left + columns]
    return placed


def _variants(frames: np.ndarray, section: int, start: float, sampling: Sampling) -> Iterator[Sample]:
    """The crops of a whole section, each as it is and, if asked, mirrored."""
    _, height, width, _ = frames.shape
    for crop in range(sampling.random_crops if sampling.fit == "random" else 1):
        random = np.random.default_rng([sampling.seed, section, crop])
        left = int(random.integers(width - sampling.width + 1))
        top = int(random.integers(height - sampling.height + 1))
        cut = frames[:, top : top + sampling.height, left : left + sampling.width]
        for flipped in (False, True)[: 1 + sampling.flip]:
            yield Sample(
                frames=np.ascontiguousarray(cut[:, :, ::-1] if flipped else cut),
                section=section,
                crop=crop,
                flipped=flipped,
                start=start,
            )
