"""Captions of single clips over HTTP: content, metrics, bad files, and the next request after each."""

import base64
import json
from pathlib import Path

import av
import numpy as np
import pytest

from lib.serving.client import health, request
from lib.video.writer import write_video
from tests.serving import wait_until_idle
from tiny import world
from tiny.evaluate_captions import agreement

ASKED = world.Attributes(shape="triangle", colour="purple", background="white", motion="left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a clip of four seconds, and files that are not clips."""
    folder = tmp_path_factory.mktemp("clips")
    scene = world.sample_scene(ASKED, np.random.default_rng(3), frames=48)
    write_video(world.render(scene, 120, 160), folder / "clip.mp4", fps=12, format="mp4", metadata={})
    whole = (folder / "clip.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return folder


@pytest.fixture
def server(serve):
    server = serve("caption")
    wait_until_idle(server.url)
    return server


def ask(server, path: Path | str, **inputs) -> dict:
    video = path if isinstance(path, str) else data_uri(path)
    wait_until_idle(server.url)  # a request right after a reply can meet 409
    return json.loads(request(server.url, "POST", "/predictions", {"input": {"video": video} | inputs})[1])


def data_uri(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def test_a_caption_describes_the_clip_and_the_metrics_how_it_was_generated(server, folder):
    reply = ask(server, folder / "clip.mp4")
    assert reply["status"] == "succeeded", reply
    assert reply["output"] == "a purple triangle moves left on a white background"
    metrics = reply["metrics"]
    assert metrics["model"] == "tiny-caption" and metrics["device"] == "cpu"
    assert metrics["frame_sampling"] == "chat" and metrics["frames"] == 4 + 1
    assert metrics["tokens"] == len(reply["output"].split())
    assert metrics["seed"] >= 0 and metrics["reading_seconds"] > 0


@pytest.mark.parametrize(
    ("sampling", "frames", "template"),
    [("chat", 5, "auto"), ("chat", 5, "base"), ("base", 24, "base"), ("uniform", 24, "auto")],
)
def test_every_sampling_and_template_describes_the_clip(server, folder, sampling, frames, template):
    reply = ask(server, folder / "clip.mp4", frame_sampling=sampling, template=template)
    assert reply["metrics"]["frames"] == frames and reply["metrics"]["frame_sampling"] == sampling
    agreed = agreement(reply["output"], ASKED)
    assert agreed["colour"] and agreed["shape"] and agreed["background"], reply["output"]


def test_a_question_is_answered(server, folder):
    reply = ask(server, folder / "clip.mp4", template="vqa", prompt="What shape is it?")
    assert reply["output"] == "triangle"


def test_temperature_samples_and_the_seed_repeats(server, folder):
    def drawn(seed: int) -> str:
        return ask(server, folder / "clip.mp4", temperature=5, top_p=1, max_new_tokens=12, seed=seed)[
            "output"
        ]

    texts = [drawn(seed) for seed in (1, 2, 3, 1)]
    assert texts[0] == texts[3] and len(set(texts)) > 1
    greedy = [ask(server, folder / "clip.mp4", seed=seed)["output"] for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_a_caption_that_is_cut_off_is_reported(server, folder):
    reply = ask(server, folder / "clip.mp4", max_new_tokens=3)
    assert reply["output"] == "a purple triangle"
    assert "the caption was cut off at max_new_tokens=3" in reply["logs"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.mp4", "cannot be decoded"),
        ("empty.mp4", "the data URI holds no file"),
        ("text.mp4", "is a text file or playlist, not a video"),
        ("sound.mp4", "no video stream"),
    ],
)
def test_a_bad_file_is_a_clear_error_and_the_next_request_works(server, folder, name, message):
    reply = ask(server, folder / name)
    assert reply["status"] == "failed" and message in reply["error"], reply
    assert ask(server, folder / "clip.mp4")["status"] == "succeeded"


@pytest.mark.parametrize(
    "inputs",
    [
        {"frame_sampling": "every"},
        {"template": "poem"},
        {"max_new_tokens": 0},
        {"temperature": 6},
        {"top_p": 0},
    ],
)
def test_invalid_inputs_are_refused(server, folder, inputs):
    status, reply = request(
        server.url, "POST", "/predictions", {"input": {"video": data_uri(folder / "clip.mp4")} | inputs}
    )
    assert status == 422, reply


def test_an_empty_prompt_and_one_that_is_too_long_are_clear_errors(server, folder):
    assert "prompt is empty" in ask(server, folder / "clip.mp4", prompt=" ")["error"]
    long = ask(server, folder / "clip.mp4", prompt="a " * 2100)
    assert long["error"].endswith("the prompt has 2100 tokens; allowed are 2048")


@pytest.mark.slow
def test_a_path_on_the_servers_disk_is_refused_unless_allowed(serve, folder):
    server = serve("caption", local_sources=False)
    wait_until_idle(server.url)
    reply = ask(server, str(folder / "clip.mp4"))
    assert reply["status"] == "failed" and "give a data URI" in reply["error"]
    assert health(server.url)["status"] == "READY"


def test_the_caption_of_a_generated_clip_is_its_prompt(serve, server, folder, tmp_path):
    video = serve("t2v")
    wait_until_idle(video.url)
    prompt = "a blue circle moves up on a black background"
    reply = request(video.url, "POST", "/predictions", {"input": {"prompt": prompt, "seed": 3}})[1]
    path = tmp_path / "made.mp4"
    path.write_bytes(base64.b64decode(json.loads(reply)["output"].partition(",")[2]))
    assert ask(server, path)["output"] == prompt
