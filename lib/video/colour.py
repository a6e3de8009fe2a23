"""Colours of HDR and wide-gamut frames, converted to sRGB: HLG, PQ, BT.2020 and Display P3.

Reference white, 203 cd/m² (ITU-R BT.2408), becomes SDR white, so that what is not a highlight looks as in an
SDR clip.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from av.video.frame import VideoFrame

PQ, HLG = 16, 18
"""FFmpeg's AVCOL_TRC_SMPTE2084 and AVCOL_TRC_ARIB_STD_B67."""
BT2020, DCI_P3, DISPLAY_P3 = 9, 11, 12
"""FFmpeg's AVCOL_PRI_BT2020, SMPTE431 and SMPTE432."""
REFERENCE_WHITE = 203.0
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2
"""Nominal peak in cd/m² of an HLG display, and the system gamma at that peak (ITU-R BT.2100, table 5)."""
KNEE = 0.92
"""Linear light from which highlights are compressed; white itself then loses four of 255 levels."""
LUMINANCE_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
LUMINANCE_709 = np.array([0.2126, 0.7152, 0.0722], np.float32)
TO_709 = {
    # ITU-R BT.2087, and the matrices from P3 (white D65) to sRGB of CSS Color 4.
    BT2020: np.array(
        [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
    ),
    DISPLAY_P3: np.array(
        [[1.22494, -0.22494, 0.0], [-0.04206, 1.04206, 0.0], [-0.01964, -0.07864, 1.09828]], np.float32
    ),
}
TO_709[DCI_P3] = TO_709[DISPLAY_P3]
"""DCI's own greenish white is for projectors; white of such files is shown as stored."""


def needs_conversion(frame: VideoFrame) -> bool:
    """Return whether a frame is tagged as HDR or as having primaries wider than sRGB's."""
    return int(frame.color_trc) in (PQ, HLG) or int(frame.color_primaries) in TO_709


def to_srgb(signal: np.ndarray, *, transfer: int, primaries: int) -> np.ndarray:
    """Return the sRGB colours, uint8 [H, W, 3], of an RGB signal, uint16 [H, W, 3]."""
    light = _linear_table(transfer)[signal]
    if transfer == HLG:  # the OOTF of ITU-R BT.2100, table 5
        luminance = np.maximum(light @ LUMINANCE_2020, 1e-6)[..., None]
        light *= luminance ** (HLG_GAMMA - 1) * (HLG_PEAK / REFERENCE_WHITE)
    if transfer in (PQ, HLG):
        primaries = primaries if primaries in TO_709 else BT2020
    if primaries in TO_709:
        light = light @ TO_709[primaries].T
    return _srgb_table()[np.round(_within_gamut(light) * 65535).astype(np.uint16)]


def _within_gamut(light: np.ndarray) -> np.ndarray:
    """Return BT.709 light between 0 and 1, in its hue: less saturated, and highlights rolled off."""
    lowest = light.min(-1, keepdims=True)
    luminance = np.maximum(light @ LUMINANCE_709, 0)[..., None]
    chroma = np.where(lowest < 0, luminance / np.maximum(luminance - lowest, 1e-9), 1)
    light = luminance + (light - luminance) * chroma if (lowest < 0).any() else light
    peak = light.max(-1, keepdims=True)
    if (peak > KNEE).any():
        over = np.maximum(peak - KNEE, 0) / (1 - KNEE)
        rolled = KNEE + (1 - KNEE) * over / (1 + over)  # slope 1 at the knee, 1 at infinity
        light = np.where(peak > KNEE, light * (rolled / np.maximum(peak, KNEE)), light)
    return np.clip(light, 0, 1)


@cache
def _linear_table(transfer: int) -> np.ndarray:
    """Return the light of every 16-bit signal; 1 is white (for HLG, of the scene at its peak)."""
    curves: dict[int, Callable[[np.ndarray], np.ndarray]] = {PQ: _pq_light, HLG: _hlg_light}
    signal = np.arange(65536) / 65535
    return curves.get(transfer, _sdr_light)(signal).astype(np.float32)


def _pq_light(signal: np.ndarray) -> np.ndarray:
    """Return the EOTF of SMPTE ST 2084."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = signal ** (1 / m2)
    return (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * (10_000 / REFERENCE_WHITE)


def _hlg_light(signal: np.ndarray) -> np.ndarray:
    """Return the inverse OETF of ITU-R BT.2100, table 5."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def _sdr_light(signal: np.ndarray) -> np.ndarray:
    """Return IEC 61966-2-1's curve, for all SDR: as players do, greys then keep their values."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


@cache
def _srgb_table() -> np.ndarray:
    """Return the 8-bit sRGB value of every 16-bit linear one."""
    light = np.arange(65536) / 65535
    return np.round(
        255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    ).astype(np.uint8)
