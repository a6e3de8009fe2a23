"""Thirty requests of every kind in turn: speed, LoRA or cancellation of one do not affect the next."""

import base64
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from diffusers import CogVideoXPipeline

from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.models.specs import SPECS
from lib.serving.client import health, request
from lib.serving.server import Server
from lib.video.writer import write_video
from tests.lora_factory import WEIGHTS, save_lora
from tests.serving import wait_until_idle
from tests.video_decoding import decode
from tiny.evaluate import DEFAULTS

STEPS = 14
EXACT = {
    "plain": {},
    "without guidance": {"guidance_scale": 1},
    "longer, guided otherwise": {
        "num_frames": 17,
        "guidance_scale": 3.5,
        "negative_prompt": "a blue square",
    },
    "another sampler": {"scheduler": "dpm", "use_dynamic_cfg": True},
    "with a LoRA": {"lora_scale": 0.7},
}
BETWEEN = [
    {"speed": "fast"},
    {"speed": "balanced", "num_frames": 17},
    {"speed": "fast", "guidance_scale": 1},
    {"speed": "balanced", "lora_scale": -1.0},
    {"speed": "fast", "scheduler": "dpm"},
]


def inputs(settings: dict, lora: Path) -> dict:
    chosen = {"lora_weights": str(lora)} if "lora_scale" in settings else {}
    return {"prompt": "a red circle moves right", "seed": 5, "num_inference_steps": STEPS} | settings | chosen


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    return save_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors", alpha=8)


@pytest.fixture(scope="module")
def expected(lora, tmp_path_factory) -> dict[str, np.ndarray]:
    """Return the frames of each exact request, encoded and decoded, from plain diffusers."""
    folder, spec, videos = tmp_path_factory.mktemp("plain"), SPECS["tiny-t2v"], {}
    for name, settings in EXACT.items():
        pipeline = CogVideoXPipeline.from_pretrained(WEIGHTS / "tiny-t2v")
        pipeline.set_progress_bar_config(disable=True)
        asked = inputs(settings, lora)
        if asked.pop("lora_weights", None):
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="plain")
            pipeline.set_adapters(["plain"], [asked.pop("lora_scale")])
        generator = Generator(spec=spec, pipeline=pipeline, report=lambda line: None)
        frames = generator.frames(build_request(spec, **DEFAULTS | asked))
        path = write_video(frames, folder / "plain.mp4", fps=spec.fps, format="mp4", metadata={})
        videos[name] = np.stack(list(decode(path).frames))
    return videos


def post(
    server: Server, settings: dict, lora: Path, path: str = "/predictions", method: str = "POST"
) -> dict:
    wait_until_idle(server.url)
    status, body = request(server.url, method, path, {"input": inputs(settings, lora)})
    assert status == 200, body
    return json.loads(body)


def cancelled(server: Server, settings: dict, lora: Path, name: str) -> None:
    replies: list[dict] = []
    slow = settings | {"num_inference_steps": 500}
    thread = threading.Thread(
        target=lambda: replies.append(post(server, slow, lora, f"/predictions/{name}", "PUT"))
    )
    wait_until_idle(server.url)  # otherwise BUSY could be from the request before
    thread.start()
    while health(server.url).get("status") != "BUSY":
        assert thread.is_alive(), replies
        time.sleep(0.02)
    request(server.url, "POST", f"/predictions/{name}/cancel")
    thread.join()
    assert replies[0]["status"] == "canceled"


def test_every_exact_request_equals_plain_diffusers_after_any_other_request(serve, lora, expected, tmp_path):
    server = serve("t2v")
    names, computed = list(EXACT), {}
    for turn in range(10):
        between = BETWEEN[turn % len(BETWEEN)]
        faster = post(server, between, lora)
        assert faster["status"] == "succeeded", faster
        computed[between["speed"]] = faster["metrics"]["computed_steps"]
        if turn % 2:
            cancelled(server, between, lora, f"turn{turn}")
        else:
            refused = post(server, between | {"num_frames": 10}, lora)
            assert refused["status"] == "failed"
        name = names[turn % len(names)]
        reply = post(server, EXACT[name], lora)
        assert reply["status"] == "succeeded", reply
        path = tmp_path / "reply.mp4"
        path.write_bytes(base64.b64decode(reply["output"].split(",", 1)[1]))
        assert np.array_equal(np.stack(list(decode(path).frames)), expected[name]), (turn, name)
        assert reply["metrics"]["computed_steps"] == STEPS
    assert computed["fast"] < STEPS
