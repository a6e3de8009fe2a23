"""A video file's frames by number: which there are, when each is shown, and how to get to one with FFmpeg.

For lib/video/decode_worker.py alone: what happens here on a damaged file must not happen in a server.
"""

import contextlib
import itertools
import os
from array import array
from collections.abc import Iterator

import av
import numpy as np

MAX_FRAME_PIXELS = 8192 * 8192
"""Above 8K in either orientation; a header that claims more is an attack or a mistake."""
DECODING_THREADS = min(4, os.cpu_count() or 1)
CONTAINERS = (
    "mov,mp4,matroska,webm,avi,asf,flv,mpeg,mpegts,ogg,gif,apng,ivf,nut,mxf,rm,wtv,dv,"
    "h264,hevc,av1,obu,m4v,mpegvideo,mjpeg,yuv4mpegpipe"
)
"""FFmpeg's readers of one file; none that opens others (playlists, image sequences) or devices."""
SEEKABLE = {"mov", "matroska", "avi", "asf", "flv", "mpegts"}
"""Where key frames can be believed; a gif's later frames are patches on what was there before."""
SEEK_GAP = 12
"""From how many frames on, that need not be decoded, a seek is cheaper than decoding on."""
SEEK_BACK_SECONDS = (0, 2, 20)
"""How much earlier to look when a seek ends behind the key frame that it was for."""

INTERLACED = {2, 3, 4, 5}
"""FFmpeg's AVFieldOrder, but for unknown and progressive."""
FRAMES_OF_FIELDS = 8
"""How many frames are looked at to see whether packets are frames or fields."""
NOTHING = object()
"""Equal to no frame's time, which None may be."""


class Undecodable(Exception):
    """Why this file gives no frames, in words for its owner."""


class Source:
    """A file's frames by number, in display order: `times` and `duration` in seconds, `fps` (0: unknown).

    The packets say which frames there are and when each is shown, so nothing is decoded to count them, and
    a frame that comes out of the decoder is known by its time. Where packets cannot say it (MPEG program
    streams, raw streams, some AVI), everything is decoded once to count, and again from the start to read.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._restart()
        self.fps = float(self._stream.average_rate or 0)
        self._seekable = not SEEKABLE.isdisjoint(self._container.format.name.split(","))
        if not (self._list_by_packets() and self._starts_as_listed()):
            self._list_by_decoding()

    def frame(self, index: int) -> av.VideoFrame:
        """Frame `index` as FFmpeg decodes it; no later call may ask for an earlier one."""
        if index == self._number:
            return self._frame
        sought = self._seek_towards(index)
        found = self._decode_until(index)
        if sought and not found:  # what was marked as a key frame is none
            self._seekable = False
            self._restart()
            found = self._decode_until(index)
        if not found:
            count = len(self.times)
            raise Undecodable(f"frame {index} of {count} cannot be decoded: damaged or cut off")
        return self._frame

    def _restart(self) -> None:
        self._container, self._stream = _open(self._path)
        self._frames = self._decoded(self._packets())
        self._number, self._frame, self._awaited_key = -1, None, None

    def _packets(self) -> Iterator:
        with contextlib.suppress(av.error.FFmpegError):  # here the file is cut off or damaged
            for packet in self._container.demux(self._stream):
                # An empty packet means that the last frame stays; the decoder would take it for the end.
                if packet.size:
                    yield packet

    def _decoded(self, packets: Iterator) -> Iterator:
        decoder = self._stream.codec_context
        for packet in itertools.chain(packets, [None]):
            try:
                frames = decoder.decode(packet)
            except av.error.FFmpegError:  # its frame will be missed if it is wanted
                continue
            yield from frames

    def _list_by_packets(self) -> bool:
        """Take the frames' times from the packets; False where frames will not come out with these times."""
        containers, decoder = self._container.format.name.split(","), self._stream.codec_context
        if "mpeg" in containers or ("avi" in containers and decoder.has_b_frames):
            return False
        pts, durations, cut_off = array("q"), array("q"), NOTHING
        key_pts, key_dts, clock = array("q"), array("q"), None
        for packet in self._packets():
            if packet.pts is None:
                return False
            if packet.dts is not None:
                if clock is not None and packet.dts < clock:  # recordings put one after another
                    return False
                clock = packet.dts
            if packet.is_keyframe:
                key_pts.append(packet.pts)
                key_dts.append(packet.pts if packet.dts is None else packet.dts)
            # What an edit list cuts away is decoded but not shown, nor are VP8's alternate references.
            if not packet.is_discard and not (decoder.name == "vp8" and not memoryview(packet)[0] & 0x10):
                pts.append(packet.pts)
                durations.append(packet.duration or 0)
            cut_off = packet.pts if packet.is_corrupt else NOTHING
        self._cut_off = cut_off
        self._first_key = key_pts[0] if key_pts else None
        self._key_pts, self._key_dts = _sorted(key_pts, key_dts)
        self._pts, durations = _sorted(pts, durations)
        self._set_times(self._pts, durations)
        return bool((np.diff(self._pts) > 0).all())

    def _starts_as_listed(self) -> bool:
        """Decode the first frame. Where the file begins midway, leave out what comes before that frame.

        The frames shown before the first key frame need others that were cut away. In an interlaced stream
        each field may have come as a packet, which the next few frames show.
        """
        self._restart()
        count = FRAMES_OF_FIELDS if self._stream.codec_context.field_order in INTERLACED else 1
        first = list(itertools.islice(self._frames, count))
        numbers = [self._number_of(frame) for frame in first]
        if not first:
            return True  # to be reported as frame 0 that cannot be decoded
        if None in numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            return False
        if numbers[0] and self._first_key is not None and first[0].pts <= self._first_key:
            start = self.times[numbers[0]]
            self._pts, self.times = self._pts[numbers[0] :], self.times[numbers[0] :] - start
            self.duration -= float(start)
        self._frames = itertools.chain(first, self._frames)
        return True

    def _list_by_decoding(self) -> None:
        self._restart()
        self._pts, self._cut_off, self._seekable = None, NOTHING, False
        pts, durations = [], []
        for frame in self._frames:
            pts.append(frame.pts)
            durations.append(frame.duration or 0)
        if None in pts or (np.diff(pts) <= 0).any():
            rate = self.fps or float(self._stream.guessed_rate or 25)
            step = max(1, round(1 / (rate * self._stream.time_base)))
            pts, durations = np.arange(len(pts)) * step, np.full(len(pts), step)
        self._set_times(np.array(pts, np.int64), np.array(durations, np.int64))
        self._restart()

    def _set_times(self, pts: np.ndarray, durations: np.ndarray) -> None:
        """Seconds from the first frame, for increasing `pts`; a last one without duration gets the usual."""
        if not len(pts):
            raise Undecodable("it has no frames")
        seconds = float(self._stream.time_base)
        self.times = (pts.astype(np.float64) - float(pts[0])) * seconds  # hostile times overflow integers
        last = float(durations[-1]) * seconds
        if last <= 0 and len(pts) > 1:
            last = float(np.median(np.diff(self.times)))
        self.duration = float(self.times[-1]) + max(0.0, last)

    def _number_of(self, frame) -> int | None:
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
        """Go to the last key frame at or before `index`, if that saves decoding; whether we did."""
        if not self._seekable:
            return False
        position = int(self._key_pts.searchsorted(self._pts[index], side="right")) - 1
        if position < 0:
            return False
        pts, dts = int(self._key_pts[position]), int(self._key_dts[position])
        number = int(self._pts.searchsorted(pts))
        if number - self._number <= SEEK_GAP:
            return False
        for seconds in SEEK_BACK_SECONDS:
            target = dts - round(seconds / self._stream.time_base)
            try:
                self._container.seek(target, stream=self._stream)
            except (av.error.FFmpegError, OverflowError):
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


def _open(path: str):
    """The container at `path` and its best video stream, ready to decode."""
    # max_pixels: neither the look into the streams nor the decoder takes memory for larger frames.
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": CONTAINERS,
        "max_pixels": str(MAX_FRAME_PIXELS),
    }
    try:
        container = av.open(path, options=options, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError):
        raise Undecodable("it is not a video, or it is damaged or cut off") from None
    picture = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & picture]
    if not streams:
        raise Undecodable("it has no video stream, or it is cut off before its index")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    decoder = stream.codec_context
    if decoder is None:
        raise Undecodable("there is no decoder for its video stream")
    if decoder.width * decoder.height > MAX_FRAME_PIXELS:
        size = f"{decoder.width}x{decoder.height}"
        raise Undecodable(f"its frames of {size} are larger than {MAX_FRAME_PIXELS:,} pixels")
    decoder.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    decoder.thread_type, decoder.thread_count = "AUTO", DECODING_THREADS
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    return container, stream
