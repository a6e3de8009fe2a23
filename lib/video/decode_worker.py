"""The child process that decodes a video with FFmpeg, so that it can be killed or crash without the server.

lib/video/reader.py runs it (see lib/sandbox/process.py) with the video's path.

Messages: `I` fields of VideoInfo (JSON), `T` frame times in seconds (float64), `F` a frame (RGB, rows from
the top). The only request is `{"indices": [increasing], "size": [width, height] or null}`.
"""

import json
import struct
import sys
from typing import cast

import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from lib.sandbox.child import Out, Refused, read_request, run
from lib.video.colour import needs_conversion, to_srgb
from lib.video.deinterlace import Progressive
from lib.video.display import has_alpha, matrix_of, on_white, over_white, shown_size
from lib.video.frame_source import Source


def serve(arguments: list[str], out: Out) -> None:
    """Send what is known of the video, then the frames that the parent asks for."""
    (path,) = arguments
    source = Source(path)
    first = source.frame(0)
    stored = (first.width, first.height)
    turn = turn_of(first)
    square = shown_size(*stored, source.pixel_aspect)
    shown = square[::-1] if turn[0] else square
    fps = source.fps
    with open(path, "rb") as file:
        is_gif = file.read(4) == b"GIF8"  # delays instead of a rate, and FFmpeg's estimate omits one
    if is_gif or fps <= 0:
        fps = len(source.times) / source.duration if source.duration > 0 else 0.0
    facts = {"frames": len(source.times), "fps": fps, "width": shown[0], "height": shown[1]}
    out.send(b"I", json.dumps(facts | {"duration": source.duration}).encode())
    out.send(b"T", source.times.tobytes())

    request = read_request()
    if request is None:
        return
    width, height = request["size"] or shown
    reformatter = VideoReformatter()
    progressive = Progressive(source)
    for index in request["indices"]:
        frame = progressive.frame(index)
        if (frame.width, frame.height) != stored:
            raise Refused("its frames change size midway")
        out.send(b"F", pixels(frame, (width, height), turn=turn, reformatter=reformatter).data.cast("B"))


def turn_of(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Return how a stored frame is shown: whether to swap x and y, then to mirror x, and to mirror y.

    The first two rows of the display matrix are the directions of the stored x and y axes; other angles are
    rounded to quarter turns.
    """
    for data in cast(SideDataContainer, frame.side_data):
        if data.type.name == "DISPLAYMATRIX":
            (a, b, _, c, d, *_) = struct.unpack("9i", bytes(data)[:36])
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return False, a < 0, d < 0
            return True, c < 0, b < 0
    return False, False, False


def pixels(
    frame: VideoFrame, size: tuple[int, int], *, turn: tuple[bool, bool, bool],
    reformatter: VideoReformatter,
) -> np.ndarray:  # fmt: skip
    """Return `frame` as shown, scaled to `size` (width, height): uint8 [H, W, 3], RGB, contiguous."""
    swap, mirror_x, mirror_y = turn
    width, height = size[::-1] if swap else size
    if needs_conversion(frame):
        # Scaled first, so that fewer pixels are converted.
        transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
        layout = "rgba64le" if has_alpha(frame) else "rgb48le"
        scaled = _scaled(frame, (width, height), layout, reformatter)
        picture = to_srgb(scaled[..., :3], transfer=transfer, primaries=primaries)
        if has_alpha(frame):
            picture = on_white(picture, scaled[..., 3:] >> 8)
    else:
        picture = _scaled(over_white(frame), (width, height), "rgb24", reformatter)
    if swap:
        picture = picture.transpose(1, 0, 2)
    return np.ascontiguousarray(picture[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1])


def _scaled(
    frame: VideoFrame, size: tuple[int, int], layout: str, reformatter: VideoReformatter
) -> np.ndarray:
    width, height = size
    rgb = reformatter.reformat(
        frame, width, height, layout, src_colorspace=matrix_of(frame), interpolation=Interpolation.BICUBIC
    )
    plane = rgb.planes[0]  # its rows may be padded
    dtype, channels = (np.uint8, 3) if layout == "rgb24" else (np.uint16, 4 if layout == "rgba64le" else 3)
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)
    used = width * channels * np.dtype(dtype).itemsize
    return np.ascontiguousarray(rows[:, :used]).view(dtype).reshape(height, width, channels)


if __name__ == "__main__":
    sys.exit(run(serve))
