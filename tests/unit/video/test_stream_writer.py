"""Videos written while frames are generated have the bytes of those written at once."""

import time

import numpy as np
import pytest

from lib.errors import UserError
from lib.video.stream_writer import StreamedVideo
from lib.video.writer import write_video


def clip(seed: int, count: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", ["mp4", "webm", "gif"])
def test_the_file_is_that_of_writing_all_frames_at_once(tmp_path, format):
    frames, settings = clip(0), {"fps": 8, "format": format, "metadata": {"prompt": "x"}}
    whole = write_video(frames, tmp_path / "whole", **settings).read_bytes()
    with StreamedVideo(tmp_path / "parts", **settings) as video:
        for start, end in ((0, 1), (1, 5), (5, 9)):
            video.add(frames[start:end])
        path = video.finish()
    assert path.read_bytes() == whole


def test_a_restart_discards_earlier_frames(tmp_path):
    settings = {"fps": 8, "format": "mp4", "metadata": {}}
    whole = write_video(clip(1), tmp_path / "whole", **settings).read_bytes()
    with StreamedVideo(tmp_path / "parts", **settings) as video:
        video.add(clip(2))
        video.restart()
        video.add(clip(1))
        assert video.finish().read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_an_unfinished_video_leaves_no_file(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        StreamedVideo(tmp_path / "a.mp4", fps=8, format="mp4", metadata={}) as video,
    ):
        video.add(clip(0))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_writer_is_raised_by_add_or_finish(tmp_path):
    settings = {"fps": 120, "format": "gif", "metadata": {}}
    with pytest.raises(UserError, match="fps is 120"), StreamedVideo(tmp_path / "a", **settings) as video:
        video.finish()
    with pytest.raises(UserError, match="fps is 120"), StreamedVideo(tmp_path / "a", **settings) as video:
        for _ in range(1000):
            video.add(clip(0))
            time.sleep(0.01)
    assert not list(tmp_path.iterdir())
