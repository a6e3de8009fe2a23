"""A story's folder: only what is missing or depends on a change is made; a person's own files stay."""

import json
import os
import threading
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.models.specs import SPECS
from lib.story.chain import make_story
from lib.story.request import build_story
from lib.story.storyboard import Scene
from lib.video.writer import write_video

IDEA = "four seasons"
FILES = {
    "storyboard.json", "film.mp4",
    *(f"scene-0{number}.{ending}" for number in range(1, 5) for ending in ("png", "mp4")),
}  # fmt: skip
VIDEO = {
    "negative_prompt": "", "num_inference_steps": 2, "guidance_scale": 6, "num_frames": None,
    "use_dynamic_cfg": False, "scheduler": "default", "speed": "exact",
}  # fmt: skip


def colour(*facts: object) -> tuple[int, int, int]:
    rng = np.random.default_rng(abs(hash(facts)) % 2**32)
    return tuple(int(value) for value in rng.integers(0, 256, 3))


class Models:
    """Stand-ins that paint flat colours, and count what they are asked for."""

    def __init__(self):
        self.spec = SPECS["tiny-i2v"]
        self.labels = {"writer": "w", "painter": "p", "video": "v"}
        self.made = Counter()
        self.open: list[str] = []

    def count_tokens(self, text):
        return len(text.split())

    @contextmanager
    def _stage(self, name):
        assert not self.open  # one after the other
        self.open.append(name)
        yield self
        self.open.remove(name)

    def writer(self):
        return self._stage("writer")

    def painter(self):
        return self._stage("painter")

    @contextmanager
    def video(self):
        with self._stage("video"):
            yield self.clip

    def write_scenes(self, idea, count, *, seed, **_):
        self.made["write"] += 1
        return tuple(
            Scene(title=f"T{n}", prompt=f"{idea} {n}", image_prompt=f"{idea} image {n} {seed}")
            for n in range(1, count + 1)
        )

    def paint(self, prompt, *, width, height, seed, stop):
        self.made[f"paint {prompt.split()[-2]}"] += 1
        return Image.new("RGB", (width, height), colour(prompt, seed))

    def clip(self, request, path, stop):
        self.made[f"clip {request.prompt.split()[-1]}"] += 1
        shade = colour(request.prompt, request.seed, request.image.tobytes())
        frames = np.full((9, request.height, request.width, 3), shade, np.uint8)
        write_video(frames, path, fps=8, format="mp4", metadata={})


def request(models, **changes):
    inputs = {
        "idea": IDEA, "scenes": 4, "storyboard": None, "image": None, "stop_after": "film",
        "only_scene": None, "transition": "cut", "transition_seconds": 0.5, "seed": 3, "width": None,
        "height": None, **VIDEO,
    }  # fmt: skip
    return build_story(models.spec, **(inputs | changes))


def run(folder, **changes):
    models = Models()
    made = make_story(request(models, **changes), folder, models, report=lambda line: None)
    assert not models.open
    return made, dict(models.made)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def edit(folder, number, **changes):
    path = folder / "storyboard.json"
    board = json.loads(path.read_text())
    board["scenes"][number - 1].update(changes)
    path.write_text(json.dumps(board))


@pytest.fixture
def folder(tmp_path):
    run(tmp_path / "story")
    return tmp_path / "story"


def test_everything_is_made_once_and_nothing_the_second_time(tmp_path):
    made, counts = run(tmp_path)
    assert counts == {"write": 1} | {f"{kind} {n}": 1 for kind in ("paint", "clip") for n in range(1, 5)}
    assert set(contents(tmp_path)) == FILES == {path.name for path in made.files}
    assert made.files[0].name == "storyboard.json" and made.files[-1].name == "film.mp4"
    before = contents(tmp_path)
    again, counts = run(tmp_path)
    assert counts == {} and again.new == [] and contents(tmp_path) == before
    assert [path.name for path in again.files] == [path.name for path in made.files]


def test_an_edited_prompt_makes_its_clip_and_the_film(folder):
    edit(folder, 3, prompt="autumn 3")
    made, counts = run(folder)
    assert counts == {"clip 3": 1} and made.new == ["scene-03.mp4", "film.mp4"]
    assert run(folder)[1] == {}


def test_an_edited_image_prompt_makes_picture_clip_and_film_of_its_scene(folder):
    edit(folder, 2, image_prompt="other image 2 x")
    made, counts = run(folder)
    assert counts == {"paint 2": 1, "clip 2": 1} and "film.mp4" in made.new


def test_a_persons_picture_is_taken_and_stays(folder):
    Image.new("RGB", (100, 80), (1, 2, 3)).save(folder / "scene-01.jpg")
    assert run(folder)[1] == {"clip 1": 1}
    edit(folder, 1, image_prompt="nobody paints image 1 this")
    assert run(folder)[1] == {}
    Image.new("RGB", (100, 80), (9, 2, 3)).save(folder / "scene-02.png")
    assert run(folder)[1] == {"clip 2": 1}


def test_a_deleted_clip_comes_back_the_same(folder):
    before = contents(folder)
    (folder / "scene-04.mp4").unlink()
    assert run(folder)[1] == {"clip 4": 1}
    assert contents(folder) == before


def test_a_persons_clip_is_taken(folder):
    write_video(np.zeros((9, 48, 64, 3), np.uint8), folder / "scene-02.mp4", fps=8, format="mp4", metadata={})
    made, counts = run(folder)
    assert counts == {} and made.new == ["film.mp4"]


def test_other_settings_make_what_depends_on_them(folder):
    assert run(folder, num_inference_steps=3)[1] == {f"clip {n}": 1 for n in range(1, 5)}
    made, counts = run(folder, num_inference_steps=3, transition="crossfade")
    assert counts == {} and made.new == ["film.mp4"]


def test_another_idea_is_written_anew_unless_the_storyboard_was_edited(folder):
    assert run(folder, idea="two")[1]["write"] == 1
    edit(folder, 1, title="Mine")
    with pytest.raises(UserError, match=r"storyboard\.json was edited and belongs to another idea, 'two'"):
        run(folder, idea="three")


def test_one_scene_alone_leaves_the_others(folder, tmp_path):
    board = folder / "storyboard.json"
    made, counts = run(tmp_path / "other", idea="", storyboard=board, only_scene=2, seed=None)
    assert counts == {"paint 2": 1, "clip 2": 1}
    assert [path.name for path in made.files] == ["storyboard.json", "scene-02.png", "scene-02.mp4"]
    assert (tmp_path / "other" / "scene-02.mp4").read_bytes() == (folder / "scene-02.mp4").read_bytes()
    with pytest.raises(UserError, match="only_scene=7 is not possible: the storyboard has 4 scenes"):
        run(tmp_path / "third", idea="", storyboard=board, only_scene=7)


def test_it_stops_after_the_stage_that_was_asked_for(tmp_path):
    assert set(contents(tmp_path)) == set() and run(tmp_path, stop_after="storyboard")[1] == {"write": 1}
    assert set(run(tmp_path, stop_after="images")[1]) == {f"paint {n}" for n in range(1, 5)}
    assert set(contents(tmp_path)) == {name for name in FILES if not name.endswith(".mp4")}


def test_the_given_image_is_the_first_keyframe(tmp_path):
    image = tmp_path / "photo.png"
    Image.new("RGB", (64, 48), (10, 20, 30)).save(image)
    _, counts = run(tmp_path / "story", image=image)
    assert "paint 1" not in counts and counts["clip 1"] == 1
    assert Image.open(tmp_path / "story" / "scene-01.png").getpixel((0, 0)) == (10, 20, 30)
    assert run(tmp_path / "story", image=image)[1] == {}


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(10))
def test_a_run_that_ends_anywhere_is_continued_to_the_same_files(folder, tmp_path, monkeypatch, moment):
    """Every write of a file and every rename is a moment at which the process may end."""

    target, left, replace = tmp_path / "killed", [2 * moment], os.replace

    def replace_or_end(source, to):
        if left[0] == 0:
            raise _Killed
        left[0] -= 1
        replace(source, to)

    monkeypatch.setattr(os, "replace", replace_or_end)
    with pytest.raises(_Killed):
        run(target)
    monkeypatch.undo()
    run(target)
    assert contents(target) == contents(folder)


def test_a_stopped_run_ends_and_keeps_what_is_complete(tmp_path):
    models, stop = Models(), threading.Event()
    paint = models.paint

    def paint_and_stop(prompt, **options):
        if stop.is_set():
            raise Stopped
        stop.set()
        return paint(prompt, **options)

    models.paint = paint_and_stop
    with pytest.raises(Stopped):
        make_story(request(models), tmp_path, models, report=lambda line: None, stop=stop)
    assert set(contents(tmp_path)) == {"storyboard.json", "scene-01.png"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": 9}, "scenes=9 is not possible: use 1 to 8."),
        ({"idea": " "}, "idea is empty: say what the film shows, or give a storyboard."),
        ({"stop_after": "clips"}, "stop_after='clips' is unknown; allowed are storyboard, images, film."),
        ({"transition_seconds": 9}, "transition_seconds=9 is not possible: use 0 to 5."),
        ({"num_frames": 10}, "num_frames=10 is not supported"),
        ({"idea": "x" * 10_001}, "idea has 10,001 characters; at most 10,000 are allowed."),
    ],
)
def test_bad_requests_are_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        run(tmp_path, **changes)
    assert contents(tmp_path) == {}


def test_a_folder_that_cannot_be_made_and_leftovers_of_a_kill(tmp_path, folder):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file could not be written"):
        run(tmp_path / "file")
    (folder / ".scene-01.partial.mp4").write_bytes(b"half")
    assert run(folder)[1] == {}
    assert {path.name for path in folder.iterdir()} == {*FILES, ".story.json"}
