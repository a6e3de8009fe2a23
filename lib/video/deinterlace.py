"""Interlaced frames made progressive, each with its neighbours, whichever frames are read."""

from av.filter import Graph
from av.video.frame import VideoFrame

from lib.sandbox.child import Refused
from lib.video.frame_source import INTERLACED, PROGRESSIVE, Source


class Progressive:
    """The frames of a source, interlaced ones made progressive: as many, at the same times."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._declared = source.field_order in INTERLACED
        self._needs_neighbours = source.field_order != PROGRESSIVE  # until a frame shows that it does not
        self._recent: dict[int, VideoFrame] = {}

    def frame(self, index: int) -> VideoFrame:
        """Return frame `index`. Indices must not decrease. Raises Refused."""
        before = self._neighbour(index - 1) if self._needs_neighbours else self._recent.get(index - 1)
        frame = self._stored(index)
        self._needs_neighbours = self._declared or frame.interlaced_frame
        if not frame.interlaced_frame:
            return frame
        return _deinterlaced(before, frame, self._neighbour(index + 1))

    def _stored(self, index: int) -> VideoFrame:
        if index not in self._recent:
            frame = self._source.frame(index)
            self._recent = {n: kept for n, kept in self._recent.items() if n >= index - 2} | {index: frame}
        return self._recent[index]

    def _neighbour(self, index: int) -> VideoFrame | None:
        if not 0 <= index < len(self._source.times):
            return None
        try:
            return self._stored(index)
        except Refused:  # reported if this frame is requested
            return None


def _deinterlaced(before: VideoFrame | None, frame: VideoFrame, after: VideoFrame | None) -> VideoFrame:
    """Return the progressive `frame` of FFmpeg's bwdif, which also looks at its neighbours."""
    shape = (frame.width, frame.height, frame.format.name)
    frames = [
        other for other in (before, frame, after)
        if other is not None and (other.width, other.height, other.format.name) == shape
    ]  # fmt: skip
    graph = Graph()
    source = graph.add_buffer(template=None, width=shape[0], height=shape[1], format=frame.format,
                              time_base=frame.time_base)  # fmt: skip
    bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
    for number, other in enumerate(frames):
        stored = other.pts
        other.pts = number
        graph.vpush(other)
        other.pts = stored
    graph.vpush(None)
    return [graph.vpull() for _ in frames][frames.index(frame)]
