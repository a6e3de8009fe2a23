"""Clips whose frames have their number encoded in their pixels."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

QUICK = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
}
BLACK, WHITE = 16, 235


def numbered_frame(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Draw a number in binary: 4x4 blocks from the top left, lowest digit first, white for 1."""
    frame = np.full((height, width, 3), BLACK, np.uint8)
    for digit in range(16):
        if number >> digit & 1:
            _block(frame, digit)[:] = WHITE
    return frame


def read_number(frame: np.ndarray) -> int:
    """Read the number in a decoded frame; fail on a block that is neither black nor white."""
    levels = [_block(frame, digit, margin=True).mean() for digit in range(16)]
    assert all(level < 80 or level > 170 for level in levels), levels
    return sum(1 << digit for digit, level in enumerate(levels) if level > 128)


def _block(frame: np.ndarray, digit: int, *, margin: bool = False) -> np.ndarray:
    height, width = frame.shape[0] // 4, frame.shape[1] // 4
    top, left = digit // 4 * height, digit % 4 * width
    edge = min(height, width) // 4 if margin else 0
    return frame[top + edge : top + height - edge, left + edge : left + width - edge]


def write_numbered(
    path: Path,
    *,
    codec: str = "libx264",
    count: int = 60,
    width: int = 64,
    height: int = 48,
    pixels: str = "yuv420p",
    rate: int = 30,
    gop: int = 12,
    times: list[int] | None = None,
    format: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write frames 0 to `count` - 1 at `rate`, or at `times` in milliseconds; return the path."""
    time_base = Fraction(1, 1000) if times else Fraction(1, rate)
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=QUICK.get(codec, {}) | (options or {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count, stream.codec_context.gop_size = 1, gop
        stream.codec_context.time_base = time_base
        for number, pts in enumerate(times or range(count)):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, width, height), format="rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts, frame.time_base = pts, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
