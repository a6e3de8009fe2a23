"""Interlaced clips are read without combs, frame for frame, in whatever order they are stored."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph

from lib.video.reader import open_video

WIDTH, HEIGHT, FRAMES = 160, 96, 12
KINDS = {
    "MPEG-2": ("clip.mpg", "mpeg2video", "yuv420p", {"b": "8M"}),
    "H.264": ("clip.mp4", "libx264", "yuv420p", {"x264-params": "interlaced=1:tff=1", "crf": "10"}),
    "FFV1, which does not say so for the stream": ("clip.mkv", "ffv1", "yuv422p", {}),
}
INTERLACED_DCT, INTERLACED_ME = 1 << 18, 1 << 29
"""FFmpeg's flags of an encoder for interlaced frames."""


def scene(time: float) -> np.ndarray:
    """A red block that moves 4 pixels to the right in each field."""
    picture = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    left = int(8 + 4 * time)
    picture[24:72, left : left + 40] = (220, 60, 60)
    return picture


def write_interlaced(folder: Path, kind: str) -> Path:
    """Write a clip whose frames hold two moments, the upper field first."""
    name, codec, layout, options = KINDS[kind]
    with av.open(folder / name, "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, layout
        stream.codec_context.flags |= INTERLACED_DCT | INTERLACED_ME
        for number in range(FRAMES):
            picture = scene(2 * number)
            picture[1::2] = scene(2 * number + 1)[1::2]
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv444p")
            graph = Graph()
            steps = [
                graph.add_buffer(None, WIDTH, HEIGHT, frame.format, time_base=Fraction(1, 25)),
                graph.add("setfield", "tff"),
                graph.add("scale", "interl=1"),
                graph.add("format", layout),
                graph.add("buffersink"),
            ]
            graph.link_nodes(*steps).configure()
            frame.pts, frame.time_base = number, Fraction(1, 25)
            graph.vpush(frame)
            container.mux(stream.encode(graph.vpull()))
        container.mux(stream.encode(None))
    return folder / name


def combing(picture: np.ndarray) -> float:
    """Return how much lines differ from the mean of their neighbours."""
    grey = picture[24:72].astype(int).mean(2)
    return float(np.abs(grey[1:-1] - (grey[:-2] + grey[2:]) / 2).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_an_interlaced_clip_has_no_combs_and_as_many_frames(tmp_path, kind):
    path = write_interlaced(tmp_path, kind)
    with av.open(path) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with open_video(path) as video:
        assert video.info.frames == FRAMES
        frames = list(video.read(range(FRAMES)))
    for number in range(2, FRAMES - 2):
        assert combing(frames[number]) < 0.5 * combing(stored[number])
        error, before = (
            np.abs(each[number].astype(int) - scene(2 * number)).mean() for each in (frames, stored)
        )
        assert error < before, "each frame shows the moment of its first field"


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_is_the_same_whichever_frames_are_read(tmp_path, kind):
    path = write_interlaced(tmp_path, kind)
    with open_video(path) as video:
        frames = list(video.read(range(FRAMES)))
    for indices in ([5], [3, 4, 9], [0, FRAMES - 1]):
        with open_video(path) as video:
            for index, frame in zip(indices, video.read(indices), strict=True):
                assert (frame == frames[index]).all(), index
