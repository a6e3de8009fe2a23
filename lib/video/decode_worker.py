"""The subprocess that decodes a video with FFmpeg, so that it can be killed or crash without the server.

lib/video/reader.py runs it (`python -P -m lib.video.decode_worker PATH CPU_SECONDS`). A damaged file can make
FFmpeg spin or crash, which no thread or signal handler within the server could stop.

Every message on stdout is one kind byte, a 4-byte big-endian length and that many bytes: `I` fields of
VideoInfo (JSON), `T` frame times in seconds (float64), `F` a frame (RGB, rows from the top), `E` why the file
cannot be decoded, `B` an internal error. The only request, a line of JSON on stdin, is
`{"indices": [increasing], "size": [width, height] or null}`.
"""

import contextlib
import fcntl
import json
import os
import resource
import signal
import struct
import sys
from typing import cast

import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from lib.video.frame_source import Source, Undecodable

ADDRESS_SPACE_BYTES = 12 << 30
"""Limit for FFmpeg."""
PIPE_BYTES = 1 << 20
"""Linux's limit for any user; at the default of 64 KiB a large frame takes a hundred wake-ups."""


def main(path: str, cpu_seconds: int) -> int:
    # The pipe is for messages: what a library prints goes to stderr.
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        _limit_resources(cpu_seconds)
        _serve(path, out)
    except BrokenPipeError:  # the reader is done
        return 0
    except Undecodable as error:
        _send(out, b"E", str(error).encode())
        return 1
    except MemoryError:
        _send(out, b"E", b"decoding it takes too much memory")
        return 1
    except Exception as error:
        _send(out, b"B", f"{type(error).__name__}: {error}".encode())
        return 1
    return 0


def _limit_resources(cpu_seconds: int) -> None:
    """Limit CPU time, for when the parent died without killing this process, and memory."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    limits = {resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":  # macOS refuses RLIMIT_AS
        limits[resource.RLIMIT_AS] = ADDRESS_SPACE_BYTES
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        if hard == resource.RLIM_INFINITY or value < hard:
            resource.setrlimit(limit, (value, hard))


def _serve(path: str, out: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    source = Source(path)
    first = source.frame(0)
    stored = (first.width, first.height)
    turn = turn_of(first)
    shown = stored[::-1] if turn[0] else stored
    fps = source.fps
    with open(path, "rb") as file:
        is_gif = file.read(4) == b"GIF8"  # delays instead of a rate, and FFmpeg's estimate omits one
    if is_gif or fps <= 0:
        fps = len(source.times) / source.duration if source.duration > 0 else 0.0
    facts = {"frames": len(source.times), "fps": fps, "width": shown[0], "height": shown[1]}
    _send(out, b"I", json.dumps(facts | {"duration": source.duration}).encode())
    _send(out, b"T", source.times.tobytes())

    line = sys.stdin.buffer.readline()
    if not line:
        return
    request = json.loads(line)
    width, height = request["size"] or shown
    reformatter = VideoReformatter()
    for index in request["indices"]:
        frame = source.frame(index)
        if (frame.width, frame.height) != stored:
            raise Undecodable("its frames change size midway")
        _send(out, b"F", pixels(frame, (width, height), turn=turn, reformatter=reformatter).data.cast("B"))


def _send(out: int, kind: bytes, payload: bytes | memoryview) -> None:
    for part in (struct.pack(">cI", kind, len(payload)), payload):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(out, rest) :]


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
    rgb = reformatter.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC)
    plane = rgb.planes[0]  # its rows may be padded
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)
    picture = rows[:, : width * 3].reshape(height, width, 3)
    if swap:
        picture = picture.transpose(1, 0, 2)
    return np.ascontiguousarray(picture[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
