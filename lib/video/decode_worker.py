"""The process that opens a video with FFmpeg, apart from the server so that it can be killed and may crash.

Run as a file by lib/video/reader.py (`python -P decode_worker.py PATH CPU_SECONDS`). A damaged file can
make FFmpeg spin or crash: no thread or signal handler in the server's own process could stop that.

Every message on stdout is one kind byte, a 4-byte big-endian length and that many bytes:
`I` facts about the file (JSON), `T` frame times in seconds (float64), `F` one frame (RGB, rows from the top),
`E` why the file cannot be decoded, `B` an error that is ours. The one request, a line of JSON on stdin, is
`{"indices": [increasing], "size": [width, height] or null}`.
"""

import contextlib
import fcntl
import json
import os
import signal
import struct
import sys
from pathlib import Path

ADDRESS_SPACE_BYTES = 12 << 30
"""What FFmpeg may map."""
PIPE_BYTES = 1 << 20
"""What Linux lets anybody ask of a pipe; at the usual 64 KiB a large frame costs a hundred wake-ups."""


def main(path: str, cpu_seconds: int) -> int:
    from lib.video.frame_source import Undecodable

    # Messages own the pipe: what a library prints goes to stderr.
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        _limit_resources(cpu_seconds)
        _serve(path, out)
    except BrokenPipeError:  # the reader has what it wanted and is gone
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
    """Let the kernel end us if our parent died without killing us, or the decoder asks for absurd memory."""
    import resource

    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    limits = {resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":  # macOS refuses RLIMIT_AS
        limits[resource.RLIMIT_AS] = ADDRESS_SPACE_BYTES
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        if hard == resource.RLIM_INFINITY or value < hard:
            resource.setrlimit(limit, (value, hard))


def _serve(path: str, out: int) -> None:
    from av.video.reformatter import VideoReformatter

    from lib.video.frame_source import Source, Undecodable

    with contextlib.suppress(AttributeError, OSError):  # Linux alone has it
        fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    source = Source(path)
    first = source.frame(0)
    stored = (first.width, first.height)
    turn = turn_of(first)
    shown = stored[::-1] if turn[0] else stored
    fps = source.fps
    with open(path, "rb") as file:
        is_gif = file.read(4) == b"GIF8"  # has delays but no rate, and FFmpeg's estimate leaves one out
    if is_gif or fps <= 0:
        fps = len(source.times) / source.duration if source.duration > 0 else 0.0
    facts = {"frames": len(source.times), "fps": fps, "width": shown[0], "height": shown[1]}
    _send(out, b"I", json.dumps(facts | {"duration": source.duration}).encode())
    _send(out, b"T", source.times.tobytes())

    line = sys.stdin.buffer.readline()
    if not line:
        return
    request = json.loads(line)
    size = tuple(request["size"] or shown)
    reformatter = VideoReformatter()
    for index in request["indices"]:
        frame = source.frame(index)
        if (frame.width, frame.height) != stored:
            raise Undecodable("its frames change size midway")
        _send(out, b"F", pixels(frame, size, turn=turn, reformatter=reformatter).data.cast("B"))


def _send(out: int, kind: bytes, payload) -> None:
    for part in (struct.pack(">cI", kind, len(payload)), payload):
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(out, rest) :]


def turn_of(frame) -> tuple[bool, bool, bool]:
    """How a stored frame becomes the shown one: whether to swap x and y, then to mirror x, and y.

    From the display matrix in the file, whose first two rows say where the stored x and y axes point; an
    angle between quarter turns counts as the nearest one.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            (a, b, _, c, d, *_) = struct.unpack("9i", bytes(data)[:36])
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return False, a < 0, d < 0
            return True, c < 0, b < 0
    return False, False, False


def pixels(frame, size: tuple[int, int], *, turn: tuple[bool, bool, bool], reformatter):
    """`frame` as shown and scaled to `size` (width, height): uint8 [H, W, 3], RGB, contiguous."""
    import numpy as np
    from av.video.reformatter import Interpolation

    swap, mirror_x, mirror_y = turn
    width, height = size[::-1] if swap else size
    rgb = reformatter.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC)
    plane = rgb.planes[0]  # its rows may be padded
    rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
    picture = rows[:, : width * 3].reshape(height, width, 3)
    if swap:
        picture = picture.transpose(1, 0, 2)
    return np.ascontiguousarray(picture[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1])


if __name__ == "__main__":
    # -P keeps out this file's own folder, where names of other packages' modules occur.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
