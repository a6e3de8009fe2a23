"""Writing mp4, webm and gif with metadata. The same input gives the same bytes."""

import io
import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from lib.errors import UserError

if TYPE_CHECKING:
    from av.container.core import Chapter

ENCODER_THREADS = 4
"""Fixed, because x264's output depends on it, and the same seed must give the same file on every machine."""
BT709 = 1
"""ITU-T H.273 code point of BT.709 as matrix, primaries and transfer."""
LIMITED_RANGE, FULL_RANGE = 1, 2
COLOUR_BINS = 1 << 18
"""Colours of a gif are counted and mapped at six bits per channel."""
VIDEO_FORMATS = {
    # At these crf values small saturated shapes lose no more than 4:2:0 costs; lower ones gain 0.2 dB.
    # chromaloc=1 tags chroma as centered between luma samples, where AREA scaling puts it; without the tag
    # good players shift it by half a pixel (-2 dB). mbtree and B-frames are off because their lookahead reads
    # uninitialized memory when frames are as small as 48x64: one clip in five had different bytes.
    "mp4": (
        "libx264",
        {
            "preset": "veryfast",
            "crf": "17",
            "x264-params": "chromaloc=1:chroma-qp-offset=-4:bframes=0:mbtree=0",
        },
        {"movflags": "+faststart"},
    ),
    "webm": ("libvpx-vp9", {"deadline": "good", "cpu-used": "5", "row-mt": "1", "crf": "18", "b": "0"}, {}),
}


def write_video(
    frames: np.ndarray | Iterable[np.ndarray],
    path: str | Path,
    *,
    fps: int | float,
    format: Literal["mp4", "webm", "gif"],
    metadata: dict[str, str],
    chapters: Sequence[tuple[int, str]] = (),
) -> Path:
    """Write frames, uint8 RGB [T, H, W, 3] or an iterable of [H, W, 3], and return the path.

    `chapters` are (first frame, title) of an mp4's or webm's chapters, in order, the first from frame 0.

    mp4 is H.264 (width and height must be even), webm is VP9; both are BT.709 4:2:0 and encoded as frames
    arrive. gif keeps all frames in memory, for one palette of 256 colours without dithering, which would
    speckle flat colours; its delays alternate between whole centiseconds so that the total is T/fps (players
    slow down frames shorter than 2 cs). The file is renamed to `path` once it is complete; a failed call
    leaves none. Raises UserError for a size or rate that the format does not support, ValueError for invalid
    frames.
    """
    path = Path(path)
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"fps is {fps:g}: it must be above 0")
    rate = Fraction(fps).limit_denominator(1001)
    stored = _to_json(metadata)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial.{format}")
    try:
        if format == "gif":
            _write_gif(_checked(frames), partial, rate, stored)
        elif format in VIDEO_FORMATS:
            _write_stream(_checked(frames), partial, rate, stored, format, chapters)
        else:
            raise ValueError(f"format is {format!r}, not mp4, webm or gif")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a file that write_video wrote, empty for other files.

    It is a JSON object in the container's `comment`, which ffprobe and players show too. For trusted files
    only: the header is read in this process.
    """
    path = Path(path)
    with path.open("rb") as file:
        is_gif = file.read(4) == b"GIF8"
    if is_gif:
        with Image.open(path, formats=("GIF",)) as image:
            comment = image.info.get("comment", b"").decode("utf-8", "replace")
    else:
        with av.open(str(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
        comment = tags.get("comment", "")
    try:
        stored = json.loads(comment)
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) else {}


def _to_json(metadata: dict[str, str]) -> str:
    """Return JSON with readable Unicode; lone surrogates, which UTF-8 cannot encode, are escaped."""
    text = json.dumps(metadata, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _checked(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the frames as contiguous arrays. Raises ValueError unless all are uint8 [H, W, 3] of one size."""
    shape = None
    for index, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape:
            raise ValueError(f"frame {index} is {frame.dtype} {frame.shape}, not uint8 {shape} as [H, W, 3]")
        yield np.ascontiguousarray(frame)
    if shape is None:
        raise ValueError("there are no frames to write")


def _write_stream(
    frames: Iterator[np.ndarray],
    target: Path,
    rate: Fraction,
    stored: str,
    format: str,
    chapters: Sequence[tuple[int, str]],
) -> None:
    codec, codec_options, container_options = VIDEO_FORMATS[format]
    first = next(frames)
    height, width = first.shape[:2]
    if format == "mp4" and (width % 2 or height % 2):
        even = f"{max(2, width - width % 2)}x{max(2, height - height % 2)}"
        raise UserError(f"an mp4's width and height must be even, not {width}x{height}: use {even} or webm")
    # bitexact omits random identifiers, dates and library versions from the container.
    options = {"fflags": "+bitexact"} | container_options
    reformatter = VideoReformatter()
    with av.open(str(target), "w", format=format, options=options) as container:
        container.metadata["comment"] = stored
        stream = container.add_stream(codec, rate=rate, options=codec_options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = ENCODER_THREADS
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        index = 0
        for index, frame in enumerate(itertools.chain([first], frames)):
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(frame, format="rgb24"),
                format="yuv420p",
                src_color_range=FULL_RANGE,
                dst_color_range=LIMITED_RANGE,
                dst_colorspace=BT709,
                interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
            )
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if chapters:  # written with the trailer; the last one's end is known only now
            container.set_chapters(_chapters(chapters, index + 1, rate))


def _chapters(chapters: Sequence[tuple[int, str]], frames: int, rate: Fraction) -> "list[Chapter]":
    ends = [*(start for start, _ in chapters[1:]), frames]
    return [
        {"id": number, "start": start, "end": end, "time_base": 1 / rate, "metadata": {"title": title}}
        for number, ((start, title), end) in enumerate(zip(chapters, ends, strict=True), start=1)
    ]


def _write_gif(frames: Iterator[np.ndarray], target: Path, rate: Fraction, stored: str) -> None:
    if rate > 100:
        raise UserError(f"fps is {float(rate):g}: a gif's delays are in 1/100 s, so it has at most 100 fps")
    kept, counts, sums = [], np.zeros(COLOUR_BINS), np.zeros((3, COLOUR_BINS))
    for frame in frames:
        kept.append(frame)
        bins = _colour_bins(frame).reshape(-1)
        counts += np.bincount(bins, minlength=COLOUR_BINS)
        for channel in range(3):
            sums[channel] += np.bincount(bins, frame[..., channel].reshape(-1), COLOUR_BINS)
    used = np.flatnonzero(counts)
    colours = (sums[:, used] / counts[used]).T
    palette = _palette(colours, counts[used])
    entry_of_bin = np.zeros(COLOUR_BINS, np.uint8)
    entry_of_bin[used] = _nearest(colours, palette)
    argb = np.zeros((256, 4), np.uint8)
    argb[:, 0] = 255
    argb[: len(palette), 1:] = palette

    height, width = kept[0].shape[:2]
    starts = [round(index * 100 / rate) for index in range(len(kept) + 1)]
    options = {"loop": "0", "final_delay": str(starts[-1] - starts[-2])}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="gif", options=options) as container:
        stream = container.add_stream("gif", rate=100)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        for start, frame in zip(starts, kept, strict=False):
            indices = entry_of_bin[_colour_bins(frame)]
            # PyAV's stubs lack the (indices, palette) form of pal8.
            pal8 = (indices, argb)
            picture = av.VideoFrame.from_ndarray(pal8, format="pal8")  # pyright: ignore[reportArgumentType]
            picture.pts, picture.time_base = start, Fraction(1, 100)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    target.write_bytes(_with_gif_comment(buffer.getvalue(), stored.encode()))


def _colour_bins(frame: np.ndarray) -> np.ndarray:
    """Return the upper six bits of each channel as one number, [H, W]."""
    high = (frame >> 2).astype(np.int32)
    return high[..., 0] << 12 | high[..., 1] << 6 | high[..., 2]


def _palette(colours: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return at most 256 colours, uint8 [N, 3], for the `colours` [M, 3] that occur `counts` [M] times.

    Median cut, then k-means, weighted by the square roots of the counts so that small shapes keep their
    colours in front of a large background.
    """
    if len(colours) <= 256:
        return np.rint(colours).astype(np.uint8)
    weights = np.sqrt(counts)
    repeats = np.maximum(1, np.rint(weights * (200_000 / weights.sum()))).astype(int)
    pixels = np.repeat(np.rint(colours).astype(np.uint8), repeats, axis=0)
    quantized = Image.fromarray(pixels[None]).quantize(256, Image.Quantize.MEDIANCUT)
    palette = np.array(quantized.getpalette("RGB"), np.float64).reshape(-1, 3)
    for _ in range(4):
        nearest = _nearest(colours, palette)
        mass = np.bincount(nearest, weights, len(palette))
        for channel in range(3):
            total = np.bincount(nearest, weights * colours[:, channel], len(palette))
            np.divide(total, mass, out=palette[:, channel], where=mass > 0)
    return np.rint(palette).astype(np.uint8)


def _nearest(colours: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return the index of the nearest palette entry [N, 3] for each colour [M, 3]."""
    entries = palette.astype(np.float32)
    squares = (entries**2).sum(1)
    chunks = np.array_split(colours.astype(np.float32), len(colours) // 8192 + 1)  # bounds memory
    return np.concatenate([(squares - 2 * chunk @ entries.T).argmin(1) for chunk in chunks])


def _with_gif_comment(gif: bytes, comment: bytes) -> bytes:
    """Insert a comment extension (GIF89a, section 24) after the global colour table."""
    flags = gif[10]
    offset = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    parts = [comment[start : start + 255] for start in range(0, len(comment), 255)]
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    return gif[:offset] + b"\x21\xfe" + blocks + b"\x00" + gif[offset:]
