"""LoRAs through real servers: what they do to the video, what the reply says, and what a bad one leaves."""

import base64
import json
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from diffusers import CogVideoXPipeline
from PIL import Image

from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.models.specs import SPECS
from lib.serving.backend import ServerError
from lib.serving.client import health, request
from lib.serving.server import Server
from lib.video.writer import read_metadata, write_video
from tests.http_host import Host, Served, hub_of
from tests.integration.conftest import start_slowly, wait_for
from tests.lora_factory import WEIGHTS, save_lora
from tests.serving import wait_until_idle
from tests.video_decoding import decode
from tiny.evaluate import DEFAULTS

QUICK = {"prompt": "a red circle moves right", "num_inference_steps": 2, "seed": 5}
RECORDED = {"base": "tiny-t2v", "task": "t2v", "trigger_word": "TOK"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def host(folder):
    """Serves a LoRA as a file, as a training's tar and on a Hub, and a file that is not a LoRA."""
    lora = save_lora(folder / "lora.safetensors", alpha=8, recorded=RECORDED)
    with tarfile.open(folder / "trained.tar", "w") as tar:
        tar.add(lora, "output/lora.safetensors")
    other = save_lora(folder / "other.safetensors", seed=3, recorded={"base": "tiny-i2v", "task": "i2v"})
    files = {
        "/lora.safetensors": Served(lora.read_bytes()),
        "/trained.tar": Served((folder / "trained.tar").read_bytes()),
        "/cut.safetensors": Served(lora.read_bytes()[:-100]),
        "/other.safetensors": Served(other.read_bytes()),
        "/silent.safetensors": Served(lora.read_bytes(), stall_at=0),
    }
    with Host(files | hub_of("me/mine", {"lora.safetensors": lora.read_bytes()}, commit="a" * 40)) as host:
        yield host


@pytest.fixture(scope="module")
def server(serve, host, tmp_path_factory) -> Server:
    cache = tmp_path_factory.mktemp("cache")
    environment = {"COGVIDEOX_CACHE": str(cache), "HF_ENDPOINT": host.address}
    server = serve("t2v", environment=environment)
    server.cache = cache
    return server


def post(server: Server, **inputs) -> dict:
    wait_until_idle(server.url)
    status, body = request(server.url, "POST", "/predictions", {"input": QUICK | inputs})
    assert status == 200, body
    return json.loads(body)


def saved(reply: dict, path: Path) -> Path:
    path.write_bytes(base64.b64decode(reply["output"].split(",", 1)[1]))
    return path


def output(server: Server, **inputs) -> str:
    reply = post(server, **inputs)
    assert reply["status"] == "succeeded", reply
    return reply["output"].split(",", 1)[1]


def pixels(reply: dict, tmp_path: Path) -> np.ndarray:
    return np.stack(list(decode(saved(reply, tmp_path / "reply.mp4")).frames))


def test_the_video_is_that_of_plain_diffusers_and_says_what_made_it(server, host, folder, tmp_path):
    reply = post(server, lora_weights=host.url("/lora.safetensors?token=secret"), lora_scale=0.7)
    assert reply["status"] == "succeeded", reply
    plain = CogVideoXPipeline.from_pretrained(WEIGHTS / "tiny-t2v")
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name="plain")
    plain.set_adapters(["plain"], [0.7])
    spec = SPECS["tiny-t2v"]
    generator = Generator(spec=spec, pipeline=plain, report=lambda line: None)
    frames = generator.frames(build_request(spec, **DEFAULTS | QUICK))
    written = write_video(frames, tmp_path / "plain.mp4", fps=spec.fps, format="mp4", metadata={})
    expected = np.stack(list(decode(written).frames))
    assert np.array_equal(pixels(reply, tmp_path), expected)
    label = host.url("/lora.safetensors")
    metrics = reply["metrics"]
    assert (metrics["lora"], metrics["lora_scale"], metrics["trigger_word"]) == (label, 0.7, "TOK")
    assert metrics["lora_seconds"] >= 0
    stored = read_metadata(tmp_path / "reply.mp4")
    assert (stored["lora"], stored["lora_scale"]) == (label, "0.7")
    assert "secret" not in json.dumps(stored | metrics) + reply["logs"]


def test_every_source_gives_the_same_video(server, host, folder):
    uri = (
        "data:application/octet-stream;base64,"
        + base64.b64encode((folder / "lora.safetensors").read_bytes()).decode()
    )
    sources = [
        host.url("/lora.safetensors"),
        host.url("/trained.tar"),
        "me/mine",
        "me/mine/lora.safetensors",
        f"{host.address}/me/mine/blob/main/lora.safetensors",
        uri,
        str(folder / "lora.safetensors"),
        str(folder / "trained.tar"),
    ]
    videos = set()
    for source in sources:
        reply = post(server, lora_weights=source, output_format="gif")
        assert reply["status"] == "succeeded", (source[:100], reply["error"])
        assert str(folder) not in json.dumps(reply["metrics"])
        videos.add(saved(reply, folder / "reply.gif").read_bytes().split(b"!\xfe")[0])
    assert len(videos) == 1


def test_strengths_change_without_a_download_and_without_it_the_base_is_back(server, host):
    before = output(server)
    full = output(server, lora_weights=host.url("/lora.safetensors"))
    asked = len(host.requests)
    half = post(server, lora_weights=host.url("/lora.safetensors"), lora_scale=0.5)
    assert len(host.requests) == asked and "loaded in" not in half["logs"]
    assert half["output"].split(",", 1)[1] != full
    assert output(server) == before != full


def test_two_loras_are_applied_and_reported_apart(server, host, folder):
    second = save_lora(folder / "second.safetensors", seed=9, metadata=False)
    extra = {"extra_lora": str(second), "extra_lora_scale": 0.5, "extra_lora_alpha": 2}
    reply = post(server, lora_weights="me/mine", **extra)
    assert reply["status"] == "succeeded", reply
    assert "Warning" not in reply["logs"]
    assert {name: value for name, value in reply["metrics"].items() if "lora" in name} == {
        "lora": "me/mine",
        "lora_scale": 1,
        "extra_lora": "second.safetensors",
        "extra_lora_scale": 0.5,
        "extra_lora_alpha": 2,
        "lora_seconds": reply["metrics"]["lora_seconds"],
    }


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"lora_weights": "/cut.safetensors"}, "is not a complete safetensors file"),
        ({"lora_weights": "/missing.safetensors"}, "the host has nothing at this address"),
        ({"lora_weights": "/other.safetensors"}, "made for another base: tiny-i2v. This model is tiny-t2v"),
        ({"lora_weights": "/lora.safetensors", "lora_alpha": 3}, "stores its own alpha, 8; leave"),
        ({"lora_weights": "/lora.ckpt"}, "is a pickle by its name"),
    ],
)
def test_a_bad_lora_fails_with_its_reason_and_the_next_request_works(server, host, inputs, message):
    good = output(server, lora_weights=host.url("/lora.safetensors"))
    reply = post(server, **inputs | {"lora_weights": host.url(inputs["lora_weights"])})
    assert reply["status"] == "failed" and message in reply["error"], reply
    assert "progress: denoising" not in reply["logs"]
    assert output(server, lora_weights=host.url("/lora.safetensors")) == good


def test_a_cancelled_download_leaves_nothing_and_the_next_request_works(server, host):
    wait_until_idle(server.url)
    thread = start_slowly(
        server.url, "silent", prompt="x", num_inference_steps=1, lora_weights=host.url("/silent.safetensors")
    )
    wait_for(lambda: any(path == "/silent.safetensors" for path, _, _ in host.requests))
    assert request(server.url, "POST", "/predictions/silent/cancel", {})[0] == 200
    thread.join(10)
    assert not thread.is_alive()
    wait_until_idle(server.url)
    assert [path.name for path in (server.cache / "loras").iterdir() if "." in path.name] == []
    assert post(server)["status"] == "succeeded"


@pytest.mark.slow
def test_cog_weights_is_every_requests_lora_unless_another_is_named(server, serve, host, folder):
    environment = {"COG_WEIGHTS": str(folder / "trained.tar"), "COGVIDEOX_CACHE": str(server.cache)}
    with Server("t2v", environment=environment, on_log=lambda line: None, timeout=120) as trained:
        assert "trigger word 'TOK'" in "\n".join(trained.log)
        reply = post(trained, output_format="mp4")
        assert (reply["metrics"]["lora"], reply["metrics"]["trigger_word"]) == ("trained.tar", "TOK")
        assert "trigger word" not in reply["logs"]
        bare = pixels(post(trained, lora_scale=0), folder)
        assert np.array_equal(bare, pixels(post(server), folder))
        named = pixels(post(server, lora_weights="me/mine"), folder)
        assert np.array_equal(pixels(reply, folder), named)
        assert "is a path on the server" in post(trained, lora_weights=str(folder / "trained.tar"))["error"]


def test_a_cog_weights_that_cannot_be_used_ends_the_start_with_the_reason(host, server):
    environment = {"COG_WEIGHTS": host.url("/other.safetensors"), "COGVIDEOX_CACHE": str(server.cache)}
    broken = Server("t2v", environment=environment, on_log=lambda line: None, timeout=120)
    with pytest.raises(ServerError, match="made for another base: tiny-i2v"), broken:
        raise AssertionError("it started")


def test_image_to_video_takes_loras_too(serve, host, folder, tmp_path):
    config = json.loads((WEIGHTS / "tiny-i2v" / "transformer" / "config.json").read_text())
    lora = save_lora(folder / "i2v.safetensors", model=config)
    server = serve("i2v")
    buffer = BytesIO()
    Image.effect_noise((64, 48), 60).convert("RGB").save(buffer, "PNG")
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    with_it = output(server, image=image, lora_weights=str(lora))
    assert with_it != output(server, image=image)
    assert health(server.url)["status"] in ("READY", "BUSY")
