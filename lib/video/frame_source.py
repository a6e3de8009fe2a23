"""The frames of a video file by number: counting them, their timestamps, and seeking, with FFmpeg.

Only for lib/video/decode_worker.py: damaged files can crash or hang the process.
"""

import contextlib
import itertools
import os
from array import array
from collections.abc import Iterator
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.codec.context import CodecContext
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from lib.sandbox.child import Refused

MAX_FRAME_PIXELS = 8192 * 8192
"""More than 8K in either orientation; a header with more is an attack or damage."""
DECODING_THREADS = min(4, os.cpu_count() or 1)
CONTAINERS = (
    "mov,mp4,matroska,webm,avi,asf,flv,mpeg,mpegts,ogg,gif,apng,ivf,nut,mxf,rm,wtv,dv,"
    "h264,hevc,av1,obu,m4v,mpegvideo,mjpeg,yuv4mpegpipe"
)
"""FFmpeg's demuxers for single files; none that opens other files (playlists, image sequences) or devices."""
SEEKABLE = {"mov", "matroska", "avi", "asf", "flv", "mpegts"}
"""Containers with reliable key frames; in a gif, frames depend on all earlier ones."""
SEEK_GAP = 12
"""Seek if it saves decoding more frames than this."""
SEEK_BACK_SECONDS = (0, 2, 20)
"""How much earlier to seek when a seek ends after the key frame that it was for."""
PROGRESSIVE = 1
INTERLACED = {2, 3, 4, 5}
"""The values of FFmpeg's AVFieldOrder for interlaced video."""
FRAMES_OF_FIELDS = 8
"""How many frames show whether a packet is a frame or a field."""
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read the second layer of a WebM, in which transparency is stored."""
NO_PTS = object()
"""Placeholder that differs from every frame's pts, which can be None."""


class Source:
    """The frames of a file in display order, with `times` and `duration` in seconds and `fps` (0: unknown).

    Frames are listed from the timestamps of the packets, without decoding, and decoded frames are identified
    by their timestamps. Where packets have no usable timestamps (MPEG program streams, raw streams, some
    AVI), the file is decoded once to count frames, and again from the start to read them.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._restart()
        self.fps = float(self._stream.average_rate or 0)
        self.pixel_aspect = self._stream.sample_aspect_ratio
        self.field_order = self._stream.codec_context.field_order
        self._seekable = not SEEKABLE.isdisjoint(self._container.format.name.split(","))
        if not (self._list_by_packets() and self._starts_as_listed()):
            self._list_by_decoding()

    def frame(self, index: int) -> VideoFrame:
        """Return frame `index` as decoded. Indices must not decrease. Raises Refused."""
        if self._frame is not None and index == self._number:
            return self._frame
        sought = self._seek_towards(index)
        found = self._decode_until(index)
        if sought and not found:  # the packet was wrongly marked as a key frame
            self._seekable = False
            self._restart()
            found = self._decode_until(index)
        if not found or self._frame is None:
            count = len(self.times)
            raise Refused(f"frame {index} of {count} cannot be decoded: damaged or cut off")
        return self._frame

    def _restart(self) -> None:
        self._container, self._stream = _open(self._path)
        self._decoder = _decoder_of(self._stream)
        self._time_base = self._stream.time_base or Fraction(1, 90_000)
        self._frames = self._decoded(self._packets())
        self._number = -1
        self._frame: VideoFrame | None = None
        self._awaited_key: int | None = None

    def _packets(self) -> Iterator[Packet]:
        with contextlib.suppress(FFmpegError):  # the file is damaged or cut off here
            for packet in self._container.demux(self._stream):
                # An empty packet repeats the last frame; the decoder would take it for the end of the file.
                if packet.size:
                    yield packet

    def _decoded(self, packets: Iterator[Packet]) -> Iterator[VideoFrame]:
        decoder = self._decoder
        for packet in itertools.chain(packets, [None]):
            try:
                frames = decoder.decode(packet)
            except FFmpegError:  # reported if this frame is requested
                continue
            yield from frames

    def _list_by_packets(self) -> bool:
        """List the frames from the packets; return False if decoded frames will have other timestamps."""
        containers, decoder = self._container.format.name.split(","), self._stream.codec_context
        if "mpeg" in containers or ("avi" in containers and decoder.has_b_frames):
            return False
        pts, durations, cut_off = array("q"), array("q"), NO_PTS
        key_pts, key_dts, clock = array("q"), array("q"), None
        for packet in self._packets():
            if packet.pts is None:
                return False
            if packet.dts is not None:
                if clock is not None and packet.dts < clock:  # concatenated recordings
                    return False
                clock = packet.dts
            if packet.is_keyframe:
                key_pts.append(packet.pts)
                key_dts.append(packet.pts if packet.dts is None else packet.dts)
            # Frames cut by an edit list and VP8's alternate references are decoded but not shown.
            if not packet.is_discard and not (decoder.name == "vp8" and not memoryview(packet)[0] & 0x10):
                pts.append(packet.pts)
                durations.append(packet.duration or 0)
            cut_off = packet.pts if packet.is_corrupt else NO_PTS
        self._cut_off = cut_off
        self._first_key = key_pts[0] if key_pts else None
        self._key_pts, self._key_dts = _sorted(key_pts, key_dts)
        self._pts, durations = _sorted(pts, durations)
        self._set_times(self._pts, durations)
        return bool((np.diff(self._pts) > 0).all())

    def _starts_as_listed(self) -> bool:
        """Compare the first decoded frames with the list; return False if they disagree.

        If the file begins in the middle of a stream, the frames before the first decodable one are removed
        from the list. In an interlaced stream packets can be fields, which takes a few frames to see.
        """
        self._restart()
        count = FRAMES_OF_FIELDS if self._stream.codec_context.field_order in INTERLACED else 1
        first = list(itertools.islice(self._frames, count))
        numbers = [self._number_of(frame) for frame in first]
        if not first:
            return True  # frame() then reports that frame 0 cannot be decoded
        start = numbers[0]
        if start is None or numbers != list(range(start, start + len(numbers))):
            return False
        if (
            start
            and self._pts is not None
            and self._first_key is not None
            and self._pts[start] <= self._first_key
        ):
            offset = self.times[start]
            self._pts, self.times = self._pts[start:], self.times[start:] - offset
            self.duration -= float(offset)
        self._frames = itertools.chain(first, self._frames)
        return True

    def _list_by_decoding(self) -> None:
        self._restart()
        self._pts, self._cut_off, self._seekable = None, NO_PTS, False
        pts, durations = [], []
        for frame in self._frames:
            pts.append(frame.pts)
            durations.append(frame.duration or 0)
        if None in pts or (np.diff(pts) <= 0).any():
            rate = self.fps or float(self._stream.guessed_rate or 25)
            step = max(1, round(1 / (rate * float(self._time_base))))
            pts, durations = np.arange(len(pts)) * step, np.full(len(pts), step)
        self._set_times(np.array(pts, np.int64), np.array(durations, np.int64))
        self._restart()

    def _set_times(self, pts: np.ndarray, durations: np.ndarray) -> None:
        """Set times and duration from increasing `pts`; a missing last duration becomes the median one."""
        if not len(pts):
            raise Refused("it has no frames")
        seconds = float(self._time_base)
        self.times = (
            pts.astype(np.float64) - float(pts[0])
        ) * seconds  # hostile timestamps overflow integers
        last = float(durations[-1]) * seconds
        if last <= 0 and len(pts) > 1:
            last = float(np.median(np.diff(self.times)))
        self.duration = float(self.times[-1]) + max(0.0, last)

    def _number_of(self, frame: VideoFrame) -> int | None:
        if self._pts is None:
            return self._number + 1
        if frame.pts is None:
            return None
        number = int(self._pts.searchsorted(frame.pts))
        return number if number < len(self._pts) and self._pts[number] == frame.pts else None

    def _decode_until(self, index: int) -> bool:
        for frame in self._frames:
            number = self._number_of(frame)
            if number is None:
                continue
            if self._awaited_key is not None and number >= self._awaited_key:
                if number > self._awaited_key or not frame.key_frame:
                    return False
                self._awaited_key = None
            self._number, self._frame = number, frame
            if number >= index:
                return number == index and frame.pts != self._cut_off
        return False

    def _seek_towards(self, index: int) -> bool:
        """Seek to the last key frame at or before `index` if that saves decoding; return whether it did."""
        if not self._seekable or self._pts is None:
            return False
        position = int(self._key_pts.searchsorted(self._pts[index], side="right")) - 1
        if position < 0:
            return False
        pts, dts = int(self._key_pts[position]), int(self._key_dts[position])
        number = int(self._pts.searchsorted(pts))
        if number - self._number <= SEEK_GAP:
            return False
        for seconds in SEEK_BACK_SECONDS:
            target = dts - round(seconds / self._time_base)
            try:
                self._container.seek(target, stream=self._stream)
                self._decoder.flush_buffers()
            except (FFmpegError, OverflowError):
                break
            packets = self._packets()
            for packet in packets:
                if packet.pts == pts:
                    self._frames = self._decoded(itertools.chain([packet], packets))
                    self._awaited_key = number
                    return True
                if packet.dts is not None and packet.dts > dts:
                    break
        self._seekable = False
        self._restart()
        return False


def _sorted(pts: array, other: array) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(pts, kind="stable")
    return np.array(pts, np.int64)[order], np.array(other, np.int64)[order]


def _decoder_of(stream: VideoStream) -> VideoCodecContext:
    """Return the stream's decoder; libvpx where it has transparency, which FFmpeg's own decoders drop."""
    decoder = stream.codec_context
    if decoder.name not in WITH_ALPHA or stream.metadata.get("alpha_mode") != "1":
        return decoder
    with_alpha = cast(VideoCodecContext, CodecContext.create(WITH_ALPHA[decoder.name], "r"))
    with_alpha.extradata = decoder.extradata
    with_alpha.options = decoder.options
    return with_alpha


def _open(path: str) -> tuple[InputContainer, VideoStream]:
    """Return the container at `path` and its best video stream, ready to decode."""
    # max_pixels keeps both probing and decoding from allocating larger frames.
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": CONTAINERS,
        "max_pixels": str(MAX_FRAME_PIXELS),
    }
    try:
        container = av.open(path, options=options, metadata_errors="replace")
    except (FFmpegError, ValueError):
        raise Refused("it is not a video, or it is damaged or cut off") from None
    cover = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise Refused("it has no video stream, or it is cut off before its index")
    best = container.streams.best("video")
    stream = next((stream for stream in streams if stream is best), streams[0])
    decoder = stream.codec_context
    if decoder is None:
        raise Refused("there is no decoder for its video stream")
    if decoder.width * decoder.height > MAX_FRAME_PIXELS:
        size = f"{decoder.width}x{decoder.height}"
        raise Refused(f"its frames of {size} are larger than {MAX_FRAME_PIXELS:,} pixels")
    decoder.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    decoder.thread_type, decoder.thread_count = "AUTO", DECODING_THREADS
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    return container, stream
