"""HDR and wide-gamut clips have the colours of the sRGB ones that they were made from."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from lib.video.colour import to_srgb
from lib.video.reader import open_video

COLOURS = np.array(
    [
        [255, 255, 255], [128, 128, 128], [20, 20, 20], [225, 30, 30],
        [30, 180, 60], [40, 70, 220], [240, 200, 40], [120, 60, 160],
    ],
    np.float64,
)  # fmt: skip
SRGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
XYZ_TO = {  # Lindbloom's method with each standard's chromaticities
    9: np.array(
        [[1.7166512, -0.3556708, -0.2533663], [-0.6666844, 1.6164812, 0.0157685],
         [0.0176399, -0.0427706, 0.9421031]]
    ),
    12: np.array(
        [[2.4934969, -0.9313836, -0.4027108], [-0.8294890, 1.7626641, 0.0236247],
         [0.0358458, -0.0761724, 0.9568845]]
    ),
}  # fmt: skip


def linear(colours: np.ndarray) -> np.ndarray:
    value = colours / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


def pq(light: np.ndarray) -> np.ndarray:
    y = (np.maximum(light, 0) * 203 / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(light: np.ndarray) -> np.ndarray:
    shown = np.maximum(light, 0) * 0.203
    luminance = shown @ [0.2627, 0.6780, 0.0593]
    scene = shown * np.maximum(luminance, 1e-9)[..., None] ** (1 / 1.2 - 1)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def signal_of(colours: np.ndarray, curve, primaries: int, gain: float = 1) -> np.ndarray:
    return curve(gain * linear(colours) @ (XYZ_TO[primaries] @ SRGB_TO_XYZ).T)


def write_clip(path: Path, signal: np.ndarray, codec: str, *, transfer: int, primaries: int) -> None:
    """Write 8 colours as bars of 32 x 64 pixels, 10-bit, BT.2020 non-constant luminance or BT.709."""
    kr, kb = (0.2627, 0.0593) if primaries == 9 else (0.2126, 0.0722)
    luma = signal @ [kr, 1 - kr - kb, kb]
    u, v = (signal[:, 2] - luma) / (2 - 2 * kb), (signal[:, 0] - luma) / (2 - 2 * kr)
    planes = [64 + 876 * luma, 512 + 896 * u, 512 + 896 * v]
    options = {"x265-params": "log-level=none:crf=4"} if codec == "libx265" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, 25, options=options)
        stream.width, stream.height, stream.pix_fmt = 256, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.color_range = transfer, primaries, 1
        context.colorspace = 9 if primaries == 9 else 1
        for number in range(3):
            frame = VideoFrame(256, 64, "yuv420p10le")
            for plane, values, shrink in zip(frame.planes, planes, (1, 2, 2), strict=True):
                rows = np.repeat(np.round(values), 32 // shrink).astype(np.uint16)
                padded = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                padded[:, : len(rows)] = rows
                plane.update(padded.tobytes())
            frame.colorspace, frame.color_range = context.colorspace, 1
            frame.color_trc, frame.color_primaries = transfer, primaries
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def bars(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    with open_video(path) as video:
        *_, frame = video.read([0, 2], size=size)
    width = frame.shape[1] // 8
    return np.array([np.median(frame[:, n * width + 4 : (n + 1) * width - 4], (0, 1)) for n in range(8)])


@pytest.mark.parametrize(("codec", "ending"), [("ffv1", "mkv"), ("libx265", "mp4")])
@pytest.mark.parametrize(
    ("curve", "transfer", "primaries", "tolerance"),
    [(hlg, 18, 9, 6), (pq, 16, 9, 12), (srgb, 14, 9, 6), (srgb, 13, 12, 6), (pq, 16, 12, 12)],
)
def test_srgb_colours_come_back(tmp_path, codec, ending, curve, transfer, primaries, tolerance):
    path = tmp_path / f"clip.{ending}"
    write_clip(path, signal_of(COLOURS, curve, primaries), codec, transfer=transfer, primaries=primaries)
    for size in (None, (128, 32)):
        assert np.abs(bars(path, size) - COLOURS).max() <= tolerance


@pytest.mark.parametrize(("curve", "transfer"), [(hlg, 18), (pq, 16)])
def test_highlights_are_rolled_off_in_their_hue_and_order(curve, transfer):
    ramp = [signal_of(COLOURS, curve, 9, gain) for gain in (1, 1.5, 2.5, 4)]
    signal = np.round(np.clip(ramp, 0, 1) * 65535).astype(np.uint16)
    shown = to_srgb(signal, transfer=transfer, primaries=9).astype(int)
    assert (np.diff(shown.max(-1), axis=0) >= 0).all()
    assert (np.ptp(shown[:, :3], axis=-1) <= 1).all()  # greys stay grey
    colours = COLOURS[3:]
    assert (shown[:, 3:].argmax(-1) == colours.argmax(-1)).all()
    assert (shown[:, 3:].argmin(-1) == colours.argmin(-1)).all()
