"""Frames are as players show them: pixel shape, transparency and colours of untagged files."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lib.video.display import shown_size
from lib.video.reader import open_video

CLIPS = Path(__file__).parents[2] / "data" / "videos"
BALL = (225, 30, 30)


def first_frame(name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    with open_video(CLIPS / name) as video:
        (frame,) = video.read([0], size=size)
    return frame


def ball(frame: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Return width, height and median colour of the red ball."""
    red = (frame[..., 0] > 150) & (frame[..., 0].astype(int) - frame[..., 1] > 80)
    rows, columns = np.nonzero(red)
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1, np.median(frame[red], axis=0)


@pytest.mark.parametrize(("name", "shown"), [("hdv_sar43.mp4", (384, 216)), ("sar12.webm", (180, 320))])
def test_pixels_that_are_not_square_are_shown_in_their_shape(name, shown):
    with open_video(CLIPS / name) as video:
        assert (video.info.width, video.info.height) == shown
    frame = first_frame(name)
    width, height, colour = ball(frame)
    assert frame.shape[1::-1] == shown
    assert abs(width - height) <= 2 and np.abs(colour - BALL).max() <= 6


@pytest.mark.parametrize(
    ("aspect", "shown"),
    [
        (None, (720, 576)),
        (Fraction(0), (720, 576)),
        (Fraction(64, 45), (1024, 576)),
        (Fraction(8, 9), (640, 576)),
        (Fraction(1, 90), (720, 576)),
        (Fraction(10**6), (720, 576)),
    ],
)
def test_an_impossible_shape_of_pixels_is_ignored(aspect, shown):
    assert shown_size(720, 576, aspect) == shown


@pytest.mark.parametrize("name", ["alpha_vp8.webm", "alpha_vp9.webm", "alpha_png.mov", "anim.png"])
def test_transparent_parts_are_white_and_what_lies_under_them_is_not_shown(name):
    for frame in (first_frame(name), first_frame(name, (64, 48))):
        corners = frame[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
        assert (255 - corners).max() <= 3
        assert np.abs(ball(frame)[2] - BALL).max() <= 6
        # A checkerboard of blue and green lies under the transparency; lossy alpha blurs the ball's edge.
        assert ((frame[..., 2].astype(int) - frame[..., 0]) > 60).mean() < 0.005


@pytest.mark.parametrize(
    ("ending", "codec", "pixels"),
    [
        (".mov", "prores_ks", "yuva444p10le"),
        (".mov", "qtrle", "argb"),
        (".mkv", "ffv1", "yuva420p"),
        (".mkv", "ffv1", "bgra"),
    ],
)
def test_transparency_of_other_codecs_is_white(tmp_path, ending, codec, pixels):
    path = tmp_path / f"clip{ending}"
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[..., 2] = 255  # blue, not shown
    picture[12:36, 16:48] = (*BALL, 255)
    with av.open(path, "w") as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pixels)
        for packet in (*stream.encode(frame), *stream.encode()):
            file.mux(packet)
    with open_video(path) as video:
        (shown,) = video.read([0])
    assert np.abs(shown[2, 2].astype(int) - 255).max() <= 3
    assert np.abs(shown[24, 32].astype(int) - BALL).max() <= 6


def test_frames_with_transparency_are_found_by_seeking_too():
    with open_video(CLIPS / "alpha_vp9.webm") as video:
        last = video.info.frames - 1
        everything = list(video.read(range(last + 1)))
    with open_video(CLIPS / "alpha_vp9.webm") as video:
        (alone,) = video.read([last])
    assert (alone == everything[-1]).all()


def test_hd_clips_without_a_tag_have_the_colours_of_tagged_ones():
    tagged, untagged = (first_frame(f"hd_{kind}709.mp4").astype(int) for kind in ("tagged", "untagged"))
    assert np.abs(tagged - untagged).max() <= 2
    assert np.abs(ball(untagged.astype(np.uint8))[2] - BALL).max() <= 6
