"""LoRA training through real servers: from a zip to a tar, refusals, cancelling and resuming."""

import base64
import io
import json
import re
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image
from safetensors.torch import load

from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.models.specs import SPECS
from lib.serving.client import health, request
from lib.serving.server import Server
from lib.storage.scratch import PREFIX
from lib.video.images import read_image
from lib.video.writer import write_video
from tests.clips_factory import caption, data_uri, losses_in, star_frames, write_clips, zip_of, zip_with
from tests.http_host import Host, Served
from tests.integration.conftest import wait_for
from tests.lora_factory import WEIGHTS
from tests.serving import wait_until_idle
from tests.video_decoding import decode
from tests.webhook_host import WebhookHost
from tiny.evaluate import DEFAULTS

QUICK = {"rank": 4, "max_train_steps": 2, "seed": 5}
SECRETS = {"hub_token": "hf_not_to_be_seen", "wandb_api_key": "key_not_to_be_seen"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def clips(folder) -> str:
    """Four clips as a zip in a data URI."""
    return data_uri(zip_of(write_clips(folder / "clips"), folder / "clips.zip"))


@pytest.fixture(scope="module")
def host(folder, clips):
    """Serves the zip, and what the tests add; as a Hub it refuses uploads."""
    with Host({"/clips.zip": Served((folder / "clips.zip").read_bytes())}) as host:
        yield host


@pytest.fixture(scope="module")
def server(serve, host, tmp_path_factory) -> Server:
    cache = tmp_path_factory.mktemp("cache")
    environment = {"COGVIDEOX_CACHE": str(cache), "HF_ENDPOINT": host.address}
    server = serve("i2v", mode="train", environment=environment)
    server.cache = cache
    return server


def post(server: Server, **inputs: Any) -> tuple[int, dict]:
    wait_until_idle(server.url)
    status, body = request(server.url, "POST", "/trainings", {"input": inputs})
    return status, json.loads(body)


def trained(server: Server, **inputs: Any) -> dict[str, bytes]:
    """The files in a training's output."""
    inputs = {name: value for name, value in (QUICK | inputs).items() if value is not None}
    status, reply = post(server, **inputs)
    assert status == 200 and reply["status"] == "succeeded", reply
    return unpacked(reply["output"]["weights"])


def unpacked(uri: str) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def losses(output: dict[str, bytes]) -> list[float]:
    return losses_in(output["loss.csv"].decode())


def same_lora(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Whether the matrices are equal bit for bit; a file's metadata changes its order from save to save."""
    first, second = load(one["lora.safetensors"]), load(other["lora.safetensors"])
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def temporary_files(server: Server) -> list[str]:
    """The content of the server's temporary folder, except the empty folder for results."""
    tmp = server.backend.scratch / "tmp"
    return [str(path) for path in tmp.rglob("*") if path.parent != tmp or not path.name.startswith(PREFIX)]


def trainings(server: Server) -> list[Path]:
    """The runs that the server keeps."""
    return sorted((server.cache / "trainings").iterdir())


def checkpoint_in(logs: str) -> Path:
    """The checkpoint that the log of an unfinished run names."""
    return Path(re.search(r"resume_from=(\S+) continues from it", logs)[1])


# From a zip to a tar


def test_a_zip_becomes_a_tar_with_the_lora_its_captions_and_its_curve(server, clips):
    inputs = QUICK | {"max_train_steps": 4, "trigger_word": "TOK", "input_videos": clips}
    with WebhookHost() as hook:
        wait_until_idle(server.url)
        body = {"input": inputs, "webhook": hook.url, "webhook_events_filter": ["start", "logs", "completed"]}
        status, reply = request(server.url, "PUT", "/trainings/first", body)
        assert (status, json.loads(reply)["status"]) == (200, "succeeded"), reply
        done = hook.wait_for("first", "succeeded")
        events = list(hook.events)
    output = unpacked(done["output"]["weights"])
    assert set(output) == {"README.md", "captions.jsonl", "lora.safetensors", "loss.csv", "loss.png"}
    rows = [json.loads(line) for line in output["captions.jsonl"].decode().splitlines()]
    assert rows == [
        {"clip": f"star-{index:03d}.mp4", "caption": f"TOK {caption(index)}", "frames": 9}
        for index in range(4)
    ]
    assert len(losses(output)) == 4
    assert Image.open(io.BytesIO(output["loss.png"])).format == "PNG"
    assert "Put `TOK` into the prompt." in output["README.md"].decode()
    assert {event["status"] for event in events} <= {"starting", "processing", "succeeded"}
    assert "progress: encoding clips 4/4" in done["logs"]
    assert re.search(r"progress: training 4/4, loss 0\.\d{4}", done["logs"])
    assert "Loading weights" not in done["logs"]
    assert any("progress:" in event["logs"] for event in events if event["status"] == "processing")
    assert trainings(server) == []


def test_a_zip_from_a_url_trains_the_same_lora(server, host, clips):
    sent, fetched = (trained(server, input_videos=source) for source in (clips, host.url("/clips.zip")))
    assert losses(sent) == losses(fetched)
    assert same_lora(sent, fetched)


@pytest.mark.slow
def test_a_text_to_video_server_trains_text_to_video(serve, clips, server):
    t2v = serve("t2v", mode="train", environment={"COGVIDEOX_CACHE": str(server.cache)})
    output = trained(t2v, input_videos=clips, validation_prompt="a star", validation_inference_steps=1)
    assert "# LoRA for tiny-t2v" in output["README.md"].decode()
    assert "validation/step-000002-1.mp4" in output
    assert len(losses(output)) == 2


# What is refused


REFUSED = {
    "out of range": ({"rank": 0}, "rank", "0 is less than the minimum of 1"),
    "wrong choice": ({"optimizer": "sgd"}, "optimizer", '"sgd" is not one of'),
    "wrong type": ({"max_train_steps": "many"}, "max_train_steps", '"many" is not of type "integer"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_input_is_422_naming_it(server, case):
    inputs, name, message = REFUSED[case]
    status, reply = post(server, **inputs)
    assert status == 422
    assert reply["detail"][0]["loc"] == ["body", "input", name]
    assert message in reply["detail"][0]["msg"]


def empty_captions(folder: Path) -> dict[str, bytes]:
    clip = (folder / "clips" / "star-000.mp4").read_bytes()
    return {"a.mp4": clip, "a.txt": b" \n", "b.mp4": clip, "b.txt": b""}


def corrupt(folder: Path) -> dict[str, bytes]:
    names = ("star-000.mp4", "star-000.txt", "star-001.mp4", "star-001.txt")
    members = {name: (folder / "clips" / name).read_bytes() for name in names}
    return members | {"broken.mp4": members["star-000.mp4"][:400], "broken.txt": b"a star"}


ARCHIVES = {
    "no clips": (lambda folder: {"readme.md": b"x"}, "holds no clips: it has 1 .md"),
    "no captions": (empty_captions, "no caption: a.txt is empty"),
    "a bomb": (lambda folder: {"bomb.mp4": 1_100_000_000}, "unpacks to more than the 1.1 GB that are"),
    "a way out": (lambda folder: {"../out.mp4": b"x"}, "../out.mp4"),
    "a corrupt clip": (corrupt, "broken.mp4"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_unusable_archive_fails_with_the_reason_and_the_server_trains_again(server, folder, clips, case):
    members, message = ARCHIVES[case]
    archive = zip_with(folder / f"{case}.zip", members(folder))
    status, reply = post(server, **QUICK, input_videos=data_uri(archive), on_bad_clip="stop")
    assert (status, reply["status"]) == (200, "failed"), reply
    assert message in reply["error"] and str(server.cache) not in reply["error"]
    assert temporary_files(server) == [] and trainings(server) == []
    assert len(losses(trained(server, input_videos=clips))) == 2


SETTINGS = {
    "nothing to learn from": ({"input_videos": None}, "input_videos"),
    "a prompt without an image": ({"validation_prompt": "a star"}, "validation needs an image for each"),
    "an optimizer of GPUs": ({"optimizer": "adamw_8bit"}, "needs an NVIDIA GPU; on this CPU use adamw."),
    "a size between": ({"width": 50}, "width"),
    "no such layer": ({"target_modules": "to_x"}, "no linear layer is called 'to_x'"),
    "a Hub that refuses": ({"hub_model_id": "me/star", **SECRETS}, "hub_model_id=me/star cannot be written"),
    "no such output": ({"resume_from": "/nowhere"}, "resume_from=/nowhere does not exist"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_an_impossible_setting_fails_with_the_reason_and_leaves_nothing(server, clips, case):
    settings, message = SETTINGS[case]
    inputs = {"input_videos": clips} | settings
    status, reply = post(server, **QUICK, **{name: v for name, v in inputs.items() if v is not None})
    assert (status, reply["status"]) == (200, "failed"), reply
    assert message in reply["error"]
    assert "not_to_be_seen" not in json.dumps(reply)
    assert temporary_files(server) == [] and trainings(server) == []


def test_a_corrupt_clip_is_left_out_and_listed(server, folder):
    archive = data_uri(zip_with(folder / "corrupt.zip", corrupt(folder)))
    output = trained(server, input_videos=archive)
    assert any(re.search(r"left out: broken\.mp4: .+", line) for line in server.log)
    assert [json.loads(line)["clip"] for line in output["captions.jsonl"].decode().splitlines()] == [
        "star-000.mp4", "star-001.mp4",
    ]  # fmt: skip
    left_out = json.loads(output["left_out.jsonl"])
    assert left_out["clip"] == "broken.mp4" and left_out["reason"]


# Resuming


def test_a_cancelled_training_leaves_a_checkpoint_that_resumes_exactly(server, clips):
    inputs = QUICK | {"max_train_steps": 5000, "input_videos": clips}
    with WebhookHost() as hook:
        wait_until_idle(server.url)
        body = {"input": inputs, "webhook": hook.url, "webhook_events_filter": ["logs", "completed"]}
        thread = threading.Thread(target=request, args=(server.url, "PUT", "/trainings/cut", body))
        thread.start()
        wait_for(lambda: any("progress: training" in event["logs"] for event in list(hook.events)))
        assert request(server.url, "POST", "/trainings/cut/cancel", {})[0] == 200
        thread.join(20)
        logs = hook.wait_for("cut", "canceled")["logs"]
    checkpoint = checkpoint_in(logs)
    assert temporary_files(server) == []
    done = int(checkpoint.name.removeprefix("step-"))
    wanted = {"max_train_steps": done + 3, "input_videos": clips}
    continued = losses(trained(server, **wanted, resume_from=str(checkpoint)))
    assert continued == losses(trained(server, **wanted))
    assert [run / "checkpoints" / checkpoint.name for run in trainings(server)] == [checkpoint]


def test_an_output_with_the_training_state_resumes_exactly(server, host, clips):
    unbroken = trained(server, input_videos=clips, max_train_steps=5)
    status, reply = post(server, **QUICK, input_videos=clips, save_training_state=True)
    assert (status, reply["status"]) == (200, "succeeded"), reply
    tar = base64.b64decode(reply["output"]["weights"].split(",", 1)[1])
    assert "training_state/training.pt" in unpacked(reply["output"]["weights"])
    host.files["/earlier.tar"] = Served(tar)
    continued = trained(
        server, input_videos=clips, max_train_steps=5, resume_from=host.url("/earlier.tar"), seed=None
    )
    assert losses(continued) == losses(unbroken)
    assert same_lora(continued, unbroken)


def test_a_training_can_start_from_a_lora_alone(server, host, clips):
    first = trained(server, input_videos=clips, max_train_steps=6, learning_rate=0.001)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("lora.safetensors")
        member.size = len(first["lora.safetensors"])
        tar.addfile(member, io.BytesIO(first["lora.safetensors"]))
    host.files["/lora.tar"] = Served(archive.getvalue())
    again = {"input_videos": clips, "learning_rate": 0, "max_train_steps": 1}
    second = trained(server, resume_from=host.url("/lora.tar"), **again)
    assert same_lora(first, second)
    assert len(losses(second)) == 1 and losses(second) != losses(trained(server, **again))


def test_secrets_are_in_no_file_and_no_line(server, clips):
    output = trained(server, input_videos=clips, save_training_state=True, **SECRETS)
    for secret in SECRETS.values():
        assert not [name for name, content in output.items() if secret.encode() in content]
        assert not [line for line in server.log if secret in line]


# The output in use


@pytest.fixture(scope="module")
def star(server, clips, folder) -> dict[str, bytes]:
    """A training that changes the model visibly, with a validation clip."""
    Image.fromarray(star_frames(9)[0]).save(folder / "star.png")
    validation = {
        "validation_prompt": caption(9),
        "validation_images": [data_uri(folder / "star.png", "image/png")],
        "validation_inference_steps": 6,
        "guidance_scale": 3,
    }
    return trained(server, input_videos=clips, max_train_steps=12, learning_rate=0.005, **validation)


def frames_of(video: bytes, folder: Path) -> np.ndarray:
    path = folder / "clip.mp4"
    path.write_bytes(video)
    return np.stack(list(decode(path).frames))


ASKED = {"prompt": caption(9), "num_inference_steps": 6, "guidance_scale": 3, "seed": QUICK["seed"]}


@pytest.mark.slow
def test_the_predictor_of_the_same_image_makes_the_trainers_validation_clip(serve, star, folder, tmp_path):
    with tarfile.open(folder / "trained_model.tar", "w") as tar:
        for name, content in star.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    predictor = serve("i2v", environment={"COG_WEIGHTS": str(folder / "trained_model.tar")})
    asked = ASKED | {"image": data_uri(folder / "star.png", "image/png")}

    def predicted(**inputs: Any) -> np.ndarray:
        wait_until_idle(predictor.url)
        _, body = request(predictor.url, "POST", "/predictions", {"input": asked | inputs})
        reply = json.loads(body)
        assert reply["status"] == "succeeded", reply
        return frames_of(base64.b64decode(reply["output"].split(",", 1)[1]), tmp_path)

    validation = frames_of(star["validation/step-000012-1.mp4"], tmp_path)
    assert np.array_equal(predicted(), validation)
    assert not np.array_equal(predicted(lora_scale=0), validation)


def test_plain_diffusers_makes_the_trainers_validation_clip(star, folder, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(star["lora.safetensors"])
    plain = CogVideoXImageToVideoPipeline.from_pretrained(WEIGHTS / "tiny-i2v")
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    spec = SPECS["tiny-i2v"]
    generator = Generator(spec=spec, pipeline=plain, report=lambda line: None)
    image = read_image(folder / "star.png", name="the star")
    asked = build_request(spec, image=image, **DEFAULTS | ASKED)
    written = write_video(
        generator.frames(asked), tmp_path / "plain.mp4", fps=spec.fps, format="mp4", metadata={}
    )
    expected = np.stack(list(decode(written).frames))
    assert np.array_equal(expected, frames_of(star["validation/step-000012-1.mp4"], tmp_path))


def test_the_server_is_ready_after_all_that(server):
    wait_until_idle(server.url)
    assert health(server.url)["status"] == "READY"
