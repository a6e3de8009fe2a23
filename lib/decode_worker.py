"""The process that opens a video with decord, apart from the server so that it can be killed and may crash.

Run as a file by lib/video.py (`python -P decode_worker.py PATH CPU_SECONDS`); imports nothing but decord and
numpy. A damaged or hostile file can make decord spin while it holds the GIL, or abort: no thread or signal
handler in the server's own process could stop that.

Every message on stdout is one kind byte, a 4-byte big-endian length and that many bytes:
`I` facts about the file (JSON), `T` frame times in seconds (float64), `F` one frame (RGB, rows from the top),
`E` why the file cannot be decoded, `B` an error that is ours. The one request, a line of JSON on stdin, is
`{"indices": [increasing], "size": [width, height] or null}`.
"""

import json
import os
import select
import signal
import struct
import sys

MAX_FRAME_PIXELS = 8192 * 8192
"""Above 8K in either orientation; a header that claims more is an attack or a mistake."""
ADDRESS_SPACE_BYTES = 12 << 30
"""What decord may map, a second net under the hoard's limit below."""
DECODING_THREADS = min(4, os.cpu_count() or 1)
HOARD_BYTES = 512 << 20
HOARD_FRAMES = 24
"""What decord may keep decoded in advance, the larger of the two."""
WATCH_MILLISECONDS = 5
"""How often memory is looked at while the reader of our frames is busy."""


class Undecodable(Exception):
    """Why this file gives no frames, in words for its owner."""


def main(path: str, cpu_seconds: int) -> int:
    # Messages own the pipe: what a library prints goes to stderr.
    out = os.dup(1)
    os.dup2(2, 1)
    os.set_blocking(out, False)
    try:
        _limit_resources(cpu_seconds)
        _serve(path, out)
    except BrokenPipeError:  # the reader has what it wanted and is gone
        return 0
    except Undecodable as error:
        _send(out, b"E", str(error).encode())
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
    import numpy as np

    source = Source(path)
    first = source.frame(0)
    height, width = first.shape[:2]
    times = source.times
    duration = float(times[:, 1].max())
    fps = source.fps
    with open(path, "rb") as file:
        is_gif = file.read(4) == b"GIF8"  # has delays but no rate, and FFmpeg's estimate leaves one out
    if is_gif or not np.isfinite(fps) or fps <= 0:
        fps = len(times) / duration if duration > 0 else 0.0
    facts = {"frames": len(times), "fps": fps, "width": width, "height": height, "duration": duration}
    _send(out, b"I", json.dumps(facts).encode(), source)
    _send(out, b"T", np.ascontiguousarray(times[:, 0]).tobytes(), source)

    _wait(0, select.POLLIN, source)
    line = sys.stdin.buffer.readline()
    if not line:
        return
    request = json.loads(line)
    if request["size"] and request["size"] != [width, height]:
        source.drop()
        source, first = Source(path, tuple(request["size"])), None
    for index in request["indices"]:
        frame = first if index == 0 and first is not None else source.frame(index)
        _send(out, b"F", np.ascontiguousarray(frame).data.cast("B"), source)


class Source:
    """A decord reader that is thrown away when it hoards, and opened again at the next frame.

    decord reads packets ahead without limit and decodes them all in the background: after the first frames
    of a 1080p film it keeps 6 MB for every further frame while nobody asks for one, and neither seeking nor
    skipping gives that back. Closing the reader does.
    """

    def __init__(self, path: str, size: tuple[int, int] = (-1, -1)) -> None:
        import numpy as np

        self._path, self._size = path, size
        self._open()
        self.times = self._reader._frame_pts.astype(np.float64)  # [T, 2] start and end, rebased to 0
        self.fps = float(self._reader.get_avg_fps())
        self._allowed = HOARD_BYTES + _resident_bytes()

    def _open(self) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        width, height = self._size
        try:
            reader = decord.VideoReader(self._path, num_threads=DECODING_THREADS, width=width, height=height)
            # Fills _frame_pts from the packets found: their number counts, not what the header claims.
            reader.get_frame_timestamp(0)
        except (RuntimeError, AssertionError, IndexError, decord.DECORDError) as error:
            if "cannot find video stream" in str(error):
                raise Undecodable("it has no video stream, or it is cut off before its index") from None
            raise Undecodable("it is not a video, or it is damaged or cut off") from None
        if len(reader._frame_pts) == 0:
            raise Undecodable("it has no frames")
        self._reader = reader

    def frame(self, index: int):
        """Frame `index` as uint8 [H, W, 3]."""
        import decord

        if self._reader is None:
            self._open()
        try:
            self._reader.seek_accurate(index)  # moves only if the wanted frame is not next
            frame = self._reader.next().asnumpy()
        except (RuntimeError, StopIteration, decord.DECORDError):
            count = len(self.times)
            raise Undecodable(f"frame {index} of {count} cannot be decoded: damaged or cut off") from None
        height, width, channels = frame.shape
        if height * width > MAX_FRAME_PIXELS:
            raise Undecodable(f"its frames of {width}x{height} are larger than {MAX_FRAME_PIXELS:,} pixels")
        self._allowed = max(self._allowed, HOARD_FRAMES * frame.nbytes)
        if channels != 3:
            # decord takes rows padded to the SIMD width for extra channels when the padding happens to be a
            # whole number of them (48 pixels wide: rows of 192 bytes, "4 channels").
            frame = frame.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3)
        return frame

    def drop(self) -> None:
        self._reader = None

    def drop_if_hoarding(self) -> None:
        if self._reader is not None and _resident_bytes() > self._allowed:
            self.drop()


def _resident_bytes() -> int:
    """This process's memory now; 0 where there is no /proc (macOS), where nothing then limits the hoard."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def _wait(descriptor: int, event: int, source: Source | None) -> None:
    """Wait until the pipe can be read or written, with an eye on what the decoder hoards meanwhile."""
    poll = select.poll()
    poll.register(descriptor, event)
    while not poll.poll(WATCH_MILLISECONDS):
        if source is not None:
            source.drop_if_hoarding()


def _send(out: int, kind: bytes, payload, source: Source | None = None) -> None:
    for part in (struct.pack(">cI", kind, len(payload)), payload):
        rest = memoryview(part)
        while rest:
            _wait(out, select.POLLOUT, source)
            rest = rest[os.write(out, rest) :]
    if source is not None:
        source.drop_if_hoarding()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
