"""From a video file to training samples: resampled to the base's rate, cut to its length and size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lib.errors import UserError
from lib.video.reader import OpenVideo, VideoInfo, open_video

LONGEST_FRAMES = 10_000
"""Limit of a file at the base's rate, about 20 minutes at 8 fps: a caption does not describe more."""
LARGEST_CUT = 16
"""Largest area of a scaled frame, in samples. Beyond it next to nothing of the picture would be kept, and
frames would be hundreds of times as wide as a sample."""
LARGEST_JITTER = 0.01
"""Seconds. Timestamps this close to a constant rate are taken for one that the container rounded: Matroska
to milliseconds, GIF to centiseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How files become samples."""

    fps: float
    """Rate of the samples; the file's speed is kept."""
    frame_step: int
    """Samples have frame_step * N + 1 frames, N at least 1."""
    max_frames: int
    """Largest number of frames."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    fit: Literal["center", "random", "none"]
    """center: fill the sample, crop both sides equally. random: fill it, crop at random. none: show the
    complete frame with black bars. The aspect ratio is always kept."""
    random_crops: int
    """Crops of each section, with `fit` random."""
    flip: bool
    """Make a mirrored variant of each sample too."""
    skip_frames_start: int
    """Frames of the file to leave out at its start."""
    skip_frames_end: int
    """Frames of the file to leave out at its end."""
    long_clips: Literal["split", "cut"]
    """Split a clip that is longer than a sample into several that cover it, or cut it after the first."""
    seed: int
    """Seed of the random crops."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One training sample in pixels."""

    frames: np.ndarray
    """uint8 [F, H, W, 3], RGB."""
    section: int
    """Index of its section in the file."""
    crop: int
    """Index of its random crop."""
    flipped: bool
    """Whether it is mirrored."""


def clip_samples(path: Path, sampling: Sampling, *, timeout: float = 120.0) -> Iterator[Sample]:
    """Yield every section x crop x side of a video, in that order of nesting.

    The file is decoded once, front to back, and at most two sections are in memory, whatever its length.
    `timeout` limits the seconds spent waiting for the decoder. Raises UserError when the file is not a
    video, is damaged, too short or too long; damage in the middle is raised after the samples before it.
    """
    with open_video(path, timeout=timeout) as video:
        times, duration = _times(video)
        parts = sections(times, duration, sampling)
        size = _scaled_size(video.info, sampling)
        # Random crops need the full frame, in which sections are kept until they are complete.
        box = size if sampling.fit == "random" else (sampling.width, sampling.height)
        open_sections: dict[int, np.ndarray] = {}
        next_part = 0
        # Every frame from the first, needed or not: to skip frames the decoder seeks, and then it returns
        # wrong ones for H.264 without B-frames, WMV and MPEG program streams.
        last = max(int(part[-1]) for part in parts)
        for index, frame in enumerate(video.read(range(last + 1), size=size)):
            while next_part < len(parts) and parts[next_part][0] <= index:
                open_sections[next_part] = np.zeros((len(parts[next_part]), *box[::-1], 3), np.uint8)
                next_part += 1
            for number in list(open_sections):
                part = parts[number]
                open_sections[number][part == index] = _placed(frame, box)
                if part[-1] == index:
                    yield from _variants(open_sections.pop(number), number, sampling)


def _times(video: OpenVideo) -> tuple[np.ndarray, float]:
    """Return the frames' timestamps and the end of the last one, in seconds.

    MPEG program streams have unusable timestamps and a usable frame rate.
    """
    usable = np.isfinite(video.timestamps).all() and video.timestamps.min() >= 0
    if usable or video.info.fps <= 0:
        return video.timestamps, video.info.duration
    return np.arange(video.info.frames) / video.info.fps, video.info.frames / video.info.fps


def sections(timestamps: np.ndarray, duration: float, sampling: Sampling) -> list[np.ndarray]:
    """Return the frame indices of each section, which do not decrease.

    `timestamps` [T] are the start times of the file's frames and `duration` the end of the last one, in
    seconds. The part that is not skipped is resampled to round(length * fps) frames; frames repeat where the
    file has fewer. A section has the most frames that the rule, the file and `max_frames` allow. With
    `long_clips` split, less than a quarter of a section may be left over at the end; beyond that, sections
    are spread evenly from the first frame to the last and may overlap.

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
        raise UserError("its frames have no timestamps: convert it to mp4")
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
    found = []
    for start in starts:
        moments = begin + (start + np.arange(longest)) / sampling.fps + tolerance
        found.append(first + np.maximum(np.searchsorted(shown_from, moments, side="right") - 1, 0))
    return found


def _rounding(timestamps: np.ndarray) -> float:
    """Return by how many seconds a timestamp may be rounded up: frames are searched that much later."""
    exact = 1e-6
    if len(timestamps) < 3:
        return exact
    constant = np.linspace(timestamps[0], timestamps[-1], len(timestamps))
    jitter = float(np.abs(timestamps - constant).max())
    # Twice, because the last timestamp, from which the constant rate follows, is rounded too.
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
    """Return width and height to decode at: one is the sample's, the other larger (with none: smaller)."""
    ratios = sampling.width / info.width, sampling.height / info.height
    scale = min(ratios) if sampling.fit == "none" else max(ratios)
    width, height = max(1, round(info.width * scale)), max(1, round(info.height * scale))
    if sampling.fit != "none" and width * height > LARGEST_CUT * sampling.width * sampling.height:
        raise UserError(
            f"too narrow: {info.width}x{info.height} would lose more than {LARGEST_CUT - 1}/{LARGEST_CUT} of "
            f"its picture when cut to {sampling.width}x{sampling.height}: use video_reshape_mode=none"
        )
    return width, height


def _placed(frame: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """Center the frame in the box [H, W, 3], cropped where it is larger and on black where it is smaller."""
    height, width, _ = frame.shape
    if (width, height) == box:
        return frame
    placed = np.zeros((box[1], box[0], 3), np.uint8)
    rows, columns = min(height, box[1]), min(width, box[0])
    top, left = (height - rows) // 2, (width - columns) // 2
    y, x = (box[1] - rows) // 2, (box[0] - columns) // 2
    placed[y : y + rows, x : x + columns] = frame[top : top + rows, left : left + columns]
    return placed


def _variants(frames: np.ndarray, section: int, sampling: Sampling) -> Iterator[Sample]:
    """Yield the crops of a complete section, each as it is and, with `flip`, mirrored."""
    _, height, width, _ = frames.shape
    for crop in range(sampling.random_crops if sampling.fit == "random" else 1):
        random = np.random.default_rng([sampling.seed, section, crop])
        left = int(random.integers(width - sampling.width + 1))
        top = int(random.integers(height - sampling.height + 1))
        cut = frames[:, top : top + sampling.height, left : left + sampling.width]
        for flipped in (False, True)[: 1 + sampling.flip]:
            pixels = np.ascontiguousarray(cut[:, :, ::-1] if flipped else cut)
            yield Sample(frames=pixels, section=section, crop=crop, flipped=flipped)
