"""Files to frames: decoding video in a subprocess that a timeout can kill.

`write_video` and `read_metadata` (frames to files) live in lib/video/writer.py and are offered here too.
"""

import contextlib
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.cancellation import check_stop
from lib.errors import UserError
from lib.predictors.compute_thread import POLL_SECONDS
from lib.video.writer import read_metadata, write_video

__all__ = [
    "Clip",
    "OpenVideo",
    "VideoInfo",
    "decode",
    "open_video",
    "probe",
    "read_metadata",
    "write_video",
]

MAX_CLIP_BYTES = 2 << 30
"""What decode() may return; open_video() streams more."""
WORKER = Path(__file__).with_name("decode_worker.py")
TEXT_STARTS = (b"#EXTM3U", b"ffconcat", b"v=0", b"<?xml", b"<MPD", b"<SmoothStreamingMedia")
"""Playlists: FFmpeg would open the other files that they name."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file holds. Sizes are as shown, after the rotation that the file asks for."""

    frames: int
    fps: float
    """Mean rate; 0.0 where the file has no times."""
    width: int
    height: int
    duration: float
    """Seconds from the first frame's start to the last frame's end."""


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Decoded frames in memory."""

    frames: np.ndarray
    """uint8 [T, H, W, 3], RGB."""
    fps: float
    """Mean rate of the file, whichever frames were taken."""
    timestamps: np.ndarray
    """float64 [T], seconds from the file's first frame to the start of each."""


def probe(path: str | Path, *, timeout: float = 60.0) -> VideoInfo:
    """Frame count, rate, size and duration. Raises UserError as open_video does."""
    with open_video(path, timeout=timeout) as video:
        return video.info


def decode(
    path: str | Path,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    max_frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    timeout: float = 60.0,
) -> Clip:
    """Decode the frames at `indices` (any order, repeats and negatives as in a list; default all).

    Of these the first `max_frames`. `width` and `height` (both or neither) scale regardless of proportions.
    `timeout` is in seconds. Raises UserError as open_video does, for an index outside the file, and where the
    result would exceed MAX_CLIP_BYTES.
    """
    if (width is None) != (height is None):
        raise ValueError("give both width and height, or neither")
    with open_video(path, timeout=timeout) as video:
        info = video.info
        wanted = (
            np.arange(info.frames) if indices is None else np.asarray(indices, dtype=np.int64).reshape(-1)
        )
        wanted = wanted[:max_frames]
        for index in wanted[(wanted < -info.frames) | (wanted >= info.frames)]:
            raise UserError(f"video {Path(path).name} has {info.frames} frames: there is no frame {index}")
        increasing, position = np.unique(
            np.where(wanted < 0, wanted + info.frames, wanted), return_inverse=True
        )
        shape = (len(increasing), height or info.height, width or info.width, 3)
        if math.prod(shape) > MAX_CLIP_BYTES or len(wanted) * math.prod(shape[1:]) > MAX_CLIP_BYTES:
            raise UserError(
                f"video {Path(path).name}: {len(wanted)} frames of {shape[2]}x{shape[1]} are more than the "
                f"{MAX_CLIP_BYTES >> 30} GiB allowed at once: use a shorter or smaller clip"
            )
        frames = np.empty(shape, np.uint8)
        size = None if width is None or height is None else (width, height)
        for slot, frame in zip(frames, video.read(increasing.tolist(), size=size), strict=True):
            slot[...] = frame
        if not np.array_equal(position, np.arange(len(increasing))):
            frames = frames[position]
        return Clip(frames, info.fps, video.timestamps[increasing][position])


@contextlib.contextmanager
def open_video(
    path: str | Path, *, timeout: float = 60.0, stop: threading.Event | None = None
) -> Iterator["OpenVideo"]:
    """A video for reading frame by frame, in memory that does not grow with its length.

    `timeout` is how many seconds may be spent waiting for the decoder, opening included; what the caller does
    between frames is not counted. The decoding process is gone when the block ends, however it ends.
    Raises UserError naming the file and the reason when it is no video, is damaged, has no video stream, or
    takes too long; Stopped soon after `stop` was set, also from within a decoder that hangs.
    """
    path = Path(path)
    _refuse_what_is_no_video(path)
    # Besides the parent's clock a CPU limit: a spinning decoder must not outlive a parent that was killed.
    cpu_seconds = math.ceil(timeout) * 4 + 10
    # -P: lib/ must not shadow other packages' modules in the worker.
    command = [sys.executable, "-P", str(WORKER), os.path.abspath(path), str(cpu_seconds)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the parent, which then kills the worker
    )
    try:
        yield OpenVideo(path, process, timeout, stop)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _refuse_what_is_no_video(path: Path) -> None:
    if not path.exists():
        raise UserError(f"video {path.name} does not exist")
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"video {path.name} is not a file")
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise UserError(f"video {path.name} is empty (0 bytes)")
    is_text = not any(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in head)
    if is_text or head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(TEXT_STARTS):
        raise UserError(f"video {path.name} is a text file or playlist, not a video")


class OpenVideo:
    """An open video file: `info`, `timestamps` (float64 [frames], seconds) and one `read`."""

    info: VideoInfo
    timestamps: np.ndarray

    def __init__(
        self, path: Path, process: subprocess.Popen, timeout: float, stop: threading.Event | None
    ) -> None:
        self._path, self._process, self._timeout, self._left = path, process, timeout, timeout
        self._stop = stop
        self._poll = select.poll()
        self._poll.register(process.stdout, select.POLLIN)
        self.info = VideoInfo(**json.loads(self._receive(b"I")))
        self.timestamps = np.frombuffer(self._receive(b"T"), np.float64)

    def read(self, indices: Sequence[int], *, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """Yield the frames at `indices`, which increase, as uint8 [H, W, 3]; once per opened video.

        `size` is (width, height), regardless of proportions; None leaves the file's.
        """
        width, height = size or (self.info.width, self.info.height)
        request = {"indices": [int(index) for index in indices], "size": size and [width, height]}
        with contextlib.suppress(BrokenPipeError):  # a worker that died says so in what we read next
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        for _ in request["indices"]:
            pixels = self._receive(b"F")
            if len(pixels) != height * width * 3:
                raise self._error("its frames change size midway")
            yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)

    def _receive(self, expected: bytes) -> bytearray:
        kind, length = struct.unpack(">cI", self._read_exactly(5))
        payload = self._read_exactly(length)
        if kind == expected:
            return payload
        if kind == b"E":
            raise self._error(payload.decode())
        raise RuntimeError(f"the decoding process failed on {self._path.name}: {payload.decode()}")

    def _read_exactly(self, length: int) -> bytearray:
        buffer = bytearray(length)
        rest = memoryview(buffer)
        while rest:
            check_stop(self._stop)
            started = time.monotonic()
            ready = self._poll.poll(max(0.0, min(self._left, POLL_SECONDS)) * 1000)
            self._left -= time.monotonic() - started
            if not ready and self._left > 0:
                continue  # a cancelled request's exception arrives between two short waits
            if not ready:
                raise self._error(f"decoding it took longer than {self._timeout:g} s")
            count = self._process.stdout.readinto(rest)
            if not count:
                raise self._error(self._how_it_ended())
            rest = rest[count:]
        return buffer

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGXCPU:
            return "decoding it took too much processor time"
        cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"the decoder crashed on it ({cause}): it is damaged, or not a video"

    def _error(self, reason: str) -> UserError:
        return UserError(f"video {self._path.name} cannot be decoded: {reason}")
