"""Films have all clips in order, with chapters, and crossfades of the asked length."""

import av
import numpy as np
import pytest

from lib.errors import UserError
from lib.story.film import FilmClip, write_film
from lib.video.reader import open_video
from lib.video.writer import write_video

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200)}
FRAMES, FPS = 9, 8


@pytest.fixture
def clips(tmp_path):
    made = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        size = (48, 64) if number < 2 else (96, 128)
        frames = np.full((FRAMES, *size, 3), colour, np.uint8)
        path = write_video(frames, tmp_path / f"{name}.mp4", fps=FPS, format="mp4", metadata={})
        made.append(FilmClip(path=path, title=f"The {name} one"))
    return made


def colours(path) -> np.ndarray:
    with open_video(path) as video:
        return np.stack([frame.mean((0, 1)) for frame in video.read(range(video.info.frames))])


def chapters(path) -> list[tuple[str, float, float]]:
    with av.open(str(path)) as container:
        return [
            (each["metadata"]["title"], *(float(each[side] * each["time_base"]) for side in ("start", "end")))
            for each in container.chapters()
        ]


def film(clips, tmp_path, transition="cut", seconds=0.5):
    return write_film(
        clips, tmp_path / "film.mp4", transition=transition, seconds=seconds, metadata={"idea": "three"}
    )


def test_a_film_with_cuts_shows_one_clip_after_the_other(clips, tmp_path):
    path = film(clips, tmp_path)
    shown = colours(path)
    wanted = np.repeat(np.array(list(COLOURS.values())), FRAMES, axis=0)
    assert shown.shape == wanted.shape
    assert np.abs(shown - wanted).max() < 8
    length = FRAMES / FPS
    assert chapters(path) == [
        (clip.title, number * length, (number + 1) * length) for number, clip in enumerate(clips)
    ]


def test_a_crossfade_mixes_the_ends_of_the_clips(clips, tmp_path):
    path = film(clips, tmp_path, "crossfade", 0.25)
    shown, (red, green, blue) = colours(path), np.array(list(COLOURS.values()), float)
    wanted = [*[red] * 7, (2 * red + green) / 3, (red + 2 * green) / 3, *[green] * 5]
    wanted += [(2 * green + blue) / 3, (green + 2 * blue) / 3, *[blue] * 7]
    assert len(shown) == len(wanted) == 3 * FRAMES - 4
    assert np.abs(shown - wanted).max() < 8
    assert [start for _, start, _ in chapters(path)] == [0, 7 / FPS, 14 / FPS]


def test_one_clip_is_a_film(clips, tmp_path):
    path = film(clips[:1], tmp_path, "crossfade", 5)
    assert len(colours(path)) == FRAMES
    assert [title for title, _, _ in chapters(path)] == ["The red one"]


def test_a_crossfade_longer_than_the_clips_is_refused_with_the_longest(clips, tmp_path):
    with pytest.raises(UserError, match=r"transition_seconds=1 is too long for scene 2, .* at most 0\.5, or"):
        film(clips, tmp_path, "crossfade", 1)
    assert not (tmp_path / "film.mp4").exists()


def test_the_same_clips_give_the_same_bytes(clips, tmp_path):
    first = film(clips, tmp_path, "crossfade", 0.25).read_bytes()
    assert film(clips, tmp_path, "crossfade", 0.25).read_bytes() == first
