"""How a stored frame is shown: the shape of its pixels, its colours, and what is transparent."""

from fractions import Fraction

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace

UNSPECIFIED = 2
"""FFmpeg's AVCOL_SPC_UNSPECIFIED."""
MAX_ASPECT = 20
"""A pixel that is longer than this is a damaged header."""
WITH_PALETTE = "pal8"


def shown_size(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Return the size with square pixels: DVDs, DV and HDV store fewer columns than are shown."""
    if not aspect or not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        return width, height
    return max(1, round(width * aspect)), height


def matrix_of(frame: VideoFrame) -> Colorspace | None:
    """Return the colour matrix of an untagged frame as players choose it, None to use the frame's own tag."""
    is_hd = frame.width >= 1280 or frame.height >= 720
    if frame.format.is_rgb or int(frame.colorspace) != UNSPECIFIED or not is_hd:
        return None
    return Colorspace.ITU709


def has_alpha(frame: VideoFrame) -> bool:
    """Return whether parts of a frame can be transparent."""
    return frame.format.name == WITH_PALETTE or any(part.is_alpha for part in frame.format.components)


def over_white(frame: VideoFrame) -> VideoFrame:
    """Return a frame with its transparent parts over white, as images are read; others unchanged."""
    if not has_alpha(frame):
        return frame
    pixels = frame.to_ndarray(format="rgba")
    return VideoFrame.from_ndarray(on_white(pixels[..., :3], pixels[..., 3:]), "rgb24")


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return colours, uint8 [H, W, 3], with `alpha` from 0 to 255, [H, W, 1], over white."""
    alpha = alpha.astype(np.uint16)
    shown = (colours.astype(np.uint16) * alpha + 255 * (255 - alpha) + 127) // 255
    return np.ascontiguousarray(shown.astype(np.uint8))
