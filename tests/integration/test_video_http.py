"""Both video predictors through a real server: Cog's reply table, files, seeds, cancelling, leftovers."""

import base64
import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from PIL import Image

from lib.serving.client import health, request
from lib.serving.server import Server
from lib.storage.scratch import PREFIX
from lib.video.writer import read_metadata
from tests.http_host import Host, Served
from tests.serving import wait_until_idle
from tests.video_decoding import decode
from tests.webhook_host import WebhookHost
from tiny import world

NAMES = ("t2v", "i2v")
QUICK = {"num_inference_steps": 2, "seed": 5}


def data_uri(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    asked = world.Attributes(shape="circle", colour="red", background="white", motion="right")
    return Image.fromarray(world.render(world.sample_scene(asked, np.random.default_rng(0)))[0])


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def server(serve, name):
    server = serve(name)
    wait_until_idle(server.url)
    return server


@pytest.fixture
def inputs(name, picture) -> dict:
    """Return the inputs of a quick request."""
    return (
        QUICK
        | {"prompt": "a red circle moves right"}
        | ({"image": data_uri(picture)} if name == "i2v" else {})
    )


@pytest.fixture
def webhooks() -> Iterator[WebhookHost]:
    with WebhookHost() as host:
        yield host


def post(
    server, inputs: dict, path: str = "/predictions", method: str = "POST", *, busy: bool = False, **fields
) -> tuple[int, dict]:
    """Send one request. coglet frees its slot shortly after it replies: wait for that unless it is busy.

    `fields` are sent next to the input in the request's body.
    """
    if not busy:
        wait_until_idle(server.url)
    status, body = request(server.url, method, path, {"input": inputs} | fields)
    return status, json.loads(body)


def send_with_headers(server, inputs: dict, headers: dict[str, str]) -> tuple[int, str]:
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    body = json.dumps({"input": inputs})
    connection.request("POST", "/predictions", body, {"Content-Type": "application/json"} | headers)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def saved(reply: dict, folder: Path) -> Path:
    """Write the reply's data URI to a file and return its path."""
    head, content = reply["output"].split(",", 1)
    path = folder / f"result.{head.split('/')[1].split(';')[0]}"
    path.write_bytes(base64.b64decode(content))
    return path


def in_background(server, inputs: dict, path: str, **fields) -> tuple[threading.Thread, list]:
    replies: list = []
    wait_until_idle(server.url)
    thread = threading.Thread(target=lambda: replies.append(post(server, inputs, path, "PUT", **fields)))
    thread.start()
    deadline = time.monotonic() + 30
    while (status := health(server.url).get("status")) != "BUSY":
        assert thread.is_alive(), f"the request ended before the server was seen BUSY: {replies}"
        assert time.monotonic() < deadline, f"the server is {status}, not BUSY, 30 s after {path} was sent"
        time.sleep(0.02)
    return thread, replies


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({"num_inference_steps": 501}, "num_inference_steps", "501 is greater than the maximum of 500"),
        ({"num_inference_steps": 0}, "num_inference_steps", "0 is less than the minimum of 1"),
        ({"guidance_scale": 0.5}, "guidance_scale", "minimum of 1"),
        ({"guidance_scale": 21}, "guidance_scale", "maximum of 20"),
        ({"num_frames": "nine"}, "num_frames", "integer"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"prompt": 3}, "prompt", "string"),
        ({"scheduler": "euler"}, "scheduler", ""),
        ({"output_format": "avi"}, "output_format", ""),
        ({"seed": None}, "seed", ""),
    ],
)
def test_inputs_that_the_schema_forbids_are_422_and_name_the_input(server, inputs, change, where, message):
    status, reply = post(server, inputs | change)
    assert status == 422
    assert reply["detail"][0]["loc"] == ["body", "input", where]
    assert message in reply["detail"][0]["msg"]


def test_a_missing_image_is_422(serve):
    server = serve("i2v")
    status, reply = post(server, QUICK | {"prompt": "x"})
    assert (status, reply["detail"][0]["loc"]) == (422, ["body", "input", "image"])


def test_an_unknown_input_is_ignored(server, inputs):
    status, reply = post(server, inputs | {"nonsense": 1})
    assert (status, reply["status"]) == (200, "succeeded")


def test_malformed_json_is_400(server):
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    connection.request("POST", "/predictions", '{"input": ', {"Content-Type": "application/json"})
    assert connection.getresponse().status == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 10}, "num_frames=10 is not supported by"),
        ({"width": 80}, "nearest: width=64, height=48"),
        ({"seed": -4}, "seed=-4 is out of range"),
    ],
)
def test_what_the_model_cannot_do_fails_with_the_nearest_valid_value_and_the_next_request_works(
    server, inputs, change, message
):
    status, reply = post(server, inputs | change)
    assert (status, reply["status"]) == (200, "failed")
    assert message in reply["error"] and "nearest" in reply["error"]
    wait_until_idle(server.url)
    assert post(server, inputs)[1]["status"] == "succeeded"


def test_a_file_that_is_not_an_image_is_reported_and_the_next_request_works(serve, picture):
    server = serve("i2v")
    wait_until_idle(server.url)
    text = "data:image/png;base64," + base64.b64encode(b"this is not a picture").decode()
    _, reply = post(server, QUICK | {"prompt": "x", "image": text})
    assert reply["status"] == "failed" and "image" in reply["error"]
    assert post(server, QUICK | {"prompt": "x", "image": data_uri(picture)})[1]["status"] == "succeeded"


def test_async_busy_repeated_and_cancelled_requests(server, inputs):
    long = inputs | {"num_inference_steps": 500}
    assert post(server, {}, "/predictions/unknown/cancel")[0] == 404
    thread, replies = in_background(server, long, "/predictions/first")
    assert post(server, inputs, busy=True)[0] == 409
    status, state = post(server, long, "/predictions/first", "PUT", busy=True)
    assert (status, state["id"]) == (202, "first")
    assert request(server.url, "GET", "/predictions/first")[0] == 405
    assert post(server, {}, "/predictions/first/cancel", busy=True)[0] == 200
    cancelled = time.monotonic()
    thread.join(timeout=60)
    assert time.monotonic() - cancelled < 20
    assert replies[0][1]["status"] == "canceled"
    wait_until_idle(server.url)
    assert post(server, inputs)[1]["status"] == "succeeded"


def test_respond_async_is_202_and_streaming_406(server, inputs):
    status, body = send_with_headers(server, inputs, {"Prefer": "respond-async"})
    assert (status, json.loads(body)["status"]) == (202, "starting")
    wait_until_idle(server.url)
    assert send_with_headers(server, inputs, {"Accept": "text/event-stream"})[0] == 406
    wait_until_idle(server.url)


@pytest.mark.parametrize(
    ("output_format", "num_frames", "fps"),
    [
        ("mp4", None, None),
        ("mp4", 17, 24),
        ("webm", 17, 24),
        ("webm", 9, 7),
        ("gif", 9, 7),
        ("gif", None, None),
    ],
)
def test_the_file_holds_exactly_the_frames_size_and_rate_asked_for(
    server, inputs, tmp_path, output_format, num_frames, fps
):
    given = {"num_frames": num_frames, "fps": fps, "output_format": output_format}
    _, reply = post(server, inputs | {k: v for k, v in given.items() if v is not None})
    assert reply["status"] == "succeeded", reply
    path = saved(reply, tmp_path)
    assert path.suffix == f".{output_format}"
    frames, rate = num_frames or 9, fps or 8
    clip = decode(path)
    assert clip.frames.shape == (frames, 48, 64, 3)
    if output_format == "gif":
        with Image.open(path) as gif:
            total = 0
            for index in range(gif.n_frames):
                gif.seek(index)
                total += gif.info["duration"]
        assert abs(total - 1000 * frames / rate) <= 10
    else:
        assert clip.fps == pytest.approx(rate, rel=1e-3)
    metrics = reply["metrics"]
    assert (metrics["frames"], metrics["width"], metrics["height"], metrics["fps"]) == (frames, 64, 48, rate)
    assert metrics["seed"] == 5
    assert {f"{stage}_seconds" for stage in ("text_encoding", "denoising", "decoding", "writing")} <= set(
        metrics
    )


def test_the_file_says_how_to_repeat_it(server, inputs, name, tmp_path):
    metadata = read_metadata(saved(post(server, inputs)[1], tmp_path))
    assert metadata["model"] == f"tiny-{name}"
    assert metadata["prompt"] == inputs["prompt"]
    assert (metadata["seed"], metadata["num_inference_steps"]) == ("5", "2")


def test_speed_applies_to_one_request_and_is_reported(server, inputs, tmp_path):
    exact = post(server, inputs | {"num_inference_steps": 13})[1]
    fast = post(server, inputs | {"num_inference_steps": 13, "speed": "fast"})[1]
    again = post(server, inputs | {"num_inference_steps": 13})[1]
    reported = [(r["metrics"]["speed"], r["metrics"]["computed_steps"]) for r in (exact, fast, again)]
    assert reported == [("exact", 13), ("fast", 12), ("exact", 13)]
    assert read_metadata(saved(fast, tmp_path))["speed"] == "fast"
    assert exact["output"] == again["output"] != fast["output"]


def test_same_seed_same_bytes_other_seed_other_frames_no_seed_a_new_one(server, inputs, tmp_path):
    first, again = post(server, inputs)[1], post(server, inputs)[1]
    assert first["output"] == again["output"]
    other = post(server, inputs | {"seed": 6})[1]
    assert not np.array_equal(decode(saved(first, tmp_path)).frames, decode(saved(other, tmp_path)).frames)
    unseeded = {k: v for k, v in inputs.items() if k != "seed"}
    seeds = [post(server, unseeded)[1]["metrics"]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_every_image_fit_reaches_the_model_and_makes_another_video(serve):
    server = serve("i2v")
    wait_until_idle(server.url)
    tall = np.full((200, 60, 3), 248, np.uint8)
    tall[:20] = (225, 30, 30)
    inputs = QUICK | {"prompt": "x", "image": data_uri(Image.fromarray(tall))}
    outputs = {post(server, inputs | {"image_fit": fit})[1]["output"] for fit in ("crop", "pad", "stretch")}
    assert len(outputs) == 3


def result_folders(temporary: Path) -> list[Path]:
    """Return the directories of requests in a server's temporary one."""
    return [f for root in temporary.glob(f"{PREFIX}*") for f in root.iterdir()]


@pytest.mark.parametrize("name", ["t2v", pytest.param("i2v", marks=pytest.mark.slow)], indirect=True)
def test_mixed_requests_leave_at_most_the_last_result_and_shutdown_leaves_nothing(name, inputs, tmp_path):
    # Not the temporary directory that Server would give it, which it always removes.
    environment = {"TMPDIR": str(tmp_path)}
    with Server(name, on_log=lambda line: None, timeout=300, environment=environment) as server:
        for turn in range(20):
            kind = ("good", "bad", "cancelled")[turn % 3]
            if kind == "cancelled":
                thread, _ = in_background(
                    server, inputs | {"num_inference_steps": 500}, f"/predictions/p{turn}"
                )
                post(server, {}, f"/predictions/p{turn}/cancel", busy=True)
                thread.join(timeout=60)
                wait_until_idle(server.url)
            else:
                post(server, inputs | ({"num_frames": 10} if kind == "bad" else {}))
            assert len(result_folders(tmp_path)) <= 1
        assert post(server, inputs)[1]["status"] == "succeeded"
        assert len(result_folders(tmp_path)) == 1
    assert list(tmp_path.glob("cogvideox-*")) == []


def test_webhooks_carry_the_log_of_a_success(server, inputs, webhooks):
    reply = post(server, inputs, "/predictions/hooked", "PUT", webhook=webhooks.url)[1]
    assert reply["status"] == "succeeded"
    event = webhooks.wait_for("hooked", "succeeded")
    assert "progress: denoising 2/2" in event["logs"]
    assert event["logs"] == reply["logs"]
    assert event["output"] == reply["output"]
    assert event["metrics"]["seed"] == 5


def test_a_failure_has_its_log_in_the_webhook_and_none_in_the_reply(server, inputs, webhooks):
    before = result_folders(server.backend.scratch / "tmp")
    long = inputs | {"num_inference_steps": 100}
    thread, replies = in_background(server, long, "/predictions/lost", webhook=webhooks.url)
    deadline = time.monotonic() + 10
    while not (made := [f for f in result_folders(server.backend.scratch / "tmp") if f not in before]):
        assert time.monotonic() < deadline, "the request made no directory"
        time.sleep(0.01)
    shutil.rmtree(made[0])  # so it fails after all steps, when it writes the file
    thread.join(timeout=60)
    status, reply = replies[0]
    assert (status, reply["status"], reply["logs"]) == (200, "failed", "")
    event = webhooks.wait_for("lost", "failed")
    assert "progress: denoising 100/100" in event["logs"]
    assert event["error"] == reply["error"]
    assert post(server, inputs)[1]["status"] == "succeeded"


def resident_bytes(server) -> int:
    process = psutil.Process(server.backend.process.pid)
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])


@pytest.mark.slow
def test_memory_after_fifty_requests_is_within_a_tenth_of_that_after_ten(server, inputs):
    sizes = {}
    for count in range(1, 51):
        assert post(server, inputs | {"seed": count})[1]["status"] == "succeeded"
        sizes[count] = resident_bytes(server)
    assert sizes[50] <= 1.1 * sizes[10]


def test_server_files_and_private_addresses_are_refused_unless_local_sources_are_on(serve, picture, tmp_path):
    path = tmp_path / "picture.png"
    picture.save(path)
    closed, opened = serve("i2v", local_sources=False), serve("i2v")
    inputs = QUICK | {"prompt": "x"}
    with Host({"/picture.png": Served(path.read_bytes())}) as host:
        for image, refusal in (
            (str(path), "is a path on the server"),
            (f"file://{path}", "is a path on the server"),
            (host.url("/picture.png"), "is not encrypted"),
            ("https://127.0.0.1:1/picture.png", "private address 127.0.0.1"),
        ):
            _, reply = post(closed, inputs | {"image": image})
            assert reply["status"] == "failed" and refusal in reply["error"], reply
        assert host.requests == []
        outputs = {
            post(opened, inputs | {"image": image})[1]["output"]
            for image in (str(path), f"file://{path}", host.url("/picture.png"), data_uri(picture))
        }
        assert len(outputs) == 1
    assert post(closed, inputs | {"image": data_uri(picture)})[1]["status"] == "succeeded"


def test_integers_may_be_written_as_floats(server, inputs):
    plain = post(server, inputs)[1]["output"]
    assert (
        post(server, inputs | {"num_inference_steps": 2.0, "seed": 5.0, "num_frames": 9.0})[1]["output"]
        == plain
    )
