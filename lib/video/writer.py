"""Frames to files: mp4, webm and gif, with what made them in the file's metadata. Same input, same bytes.

Callers use it through lib/video/reader.py.
"""

import io
import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np

from lib.errors import UserError

ENCODER_THREADS = 4
"""Fixed, because x264's bytes depend on the number of threads, and the same seed is to give the same file
on every machine."""
BT709 = 1
"""ITU-T H.273 code point of BT.709 as matrix, primaries and transfer."""
LIMITED_RANGE, FULL_RANGE = 1, 2
COLOUR_BINS = 1 << 18
"""A gif's colours are counted and mapped at six bits per channel."""
VIDEO_FORMATS = {
    # At these crf values the loss on small saturated shapes is that of 4:2:0 itself: lower ones gain 0.2 dB.
    # chromaloc=1: chroma sits between the luma samples, as AREA scaling leaves it; untagged, good players
    # would shift it by half a pixel (-2 dB). mbtree and B-frames are
    # off because their lookahead reads memory that x264 never wrote when frames are as small as 48x64:
    # one clip in five came out with other bytes.
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
) -> Path:
    """Write frames, uint8 RGB [T, H, W, 3] or an iterable of [H, W, 3], and return the path.

    mp4 is H.264 (width and height must be even), webm is VP9, both BT.709 at 4:2:0 and encoded as frames
    arrive. gif has one palette of 256 colours for the whole clip, undithered because dithering speckles flat
    colours, so its frames are kept until the last one came; delays alternate between whole centiseconds so
    that the total is T/fps (players slow down frames shorter than 2 cs). The file appears under its name
    only when whole; on failure nothing is left.
    Raises UserError for a size or rate that the format cannot hold, ValueError for frames of a wrong kind.
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
            _write_stream(_checked(frames), partial, rate, stored, format)
        else:
            raise ValueError(f"format is {format!r}, not mp4, webm or gif")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_metadata(path: str | Path) -> dict[str, str]:
    """What write_video stored in the file; empty for a file that it did not write.

    It is one JSON object in the container's `comment`, which ffprobe and players show too. For files of
    one's own: unlike decode, it reads the header in this process.
    """
    path = Path(path)
    with path.open("rb") as file:
        is_gif = file.read(4) == b"GIF8"
    if is_gif:
        from PIL import Image

        with Image.open(path, formats=("GIF",)) as image:
            comment = image.info.get("comment", b"").decode("utf-8", "replace")
    else:
        import av

        with av.open(str(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
        comment = tags.get("comment", "")
    try:
        stored = json.loads(comment)
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) else {}


def _to_json(metadata: dict[str, str]) -> str:
    """JSON with readable Unicode; a lone surrogate, which UTF-8 cannot hold, stays an escape."""
    text = json.dumps(metadata, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _checked(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames, contiguous, each held to be uint8 [H, W, 3] of the first one's size; at least one."""
    shape = None
    for index, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape:
            raise ValueError(f"frame {index} is {frame.dtype} {frame.shape}, not uint8 {shape} as [H, W, 3]")
        yield np.ascontiguousarray(frame)
    if shape is None:
        raise ValueError("there are no frames to write")


def _write_stream(
    frames: Iterator[np.ndarray], target: Path, rate: Fraction, stored: str, format: str
) -> None:
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    codec, codec_options, container_options = VIDEO_FORMATS[format]
    first = next(frames)
    height, width = first.shape[:2]
    if format == "mp4" and (width % 2 or height % 2):
        even = f"{max(2, width - width % 2)}x{max(2, height - height % 2)}"
        raise UserError(f"an mp4's width and height must be even, not {width}x{height}: use {even} or webm")
    # bitexact keeps random identifiers, dates and library versions out of the container.
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


def _write_gif(frames: Iterator[np.ndarray], target: Path, rate: Fraction, stored: str) -> None:
    import av

    if rate > 100:
        raise UserError(
            f"fps is {float(rate):g}: a gif counts in 1/100 s and holds at most 100 frames a second"
        )
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
            picture = av.VideoFrame.from_ndarray((indices, argb), format="pal8")
            picture.pts, picture.time_base = start, Fraction(1, 100)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    target.write_bytes(_with_gif_comment(buffer.getvalue(), stored.encode()))


def _colour_bins(frame: np.ndarray) -> np.ndarray:
    """The upper six bits of each channel as one number, [H, W]."""
    high = (frame >> 2).astype(np.int32)
    return high[..., 0] << 12 | high[..., 1] << 6 | high[..., 2]


def _palette(colours: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """At most 256 colours, uint8 [N, 3], for the `colours` [M, 3] that occur `counts` [M] times.

    Median cut, then k-means. Weights are roots of the counts, so that a small shape keeps its colours
    before a large background.
    """
    from PIL import Image

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
    """For each colour [M, 3] the entry of the palette [N, 3] nearest to it, [M]."""
    entries = palette.astype(np.float32)
    squares = (entries**2).sum(1)
    chunks = np.array_split(colours.astype(np.float32), len(colours) // 8192 + 1)  # bounds memory
    return np.concatenate([(squares - 2 * chunk @ entries.T).argmin(1) for chunk in chunks])


def _with_gif_comment(gif: bytes, comment: bytes) -> bytes:
    """The file with a comment extension (GIF89a, section 24) right after its global colour table."""
    flags = gif[10]
    offset = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    parts = [comment[start : start + 255] for start in range(0, len(comment), 255)]
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    return gif[:offset] + b"\x21\xfe" + blocks + b"\x00" + gif[offset:]
