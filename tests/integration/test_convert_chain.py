"""From SAT's files to a video: converted by the predictors, served by the video predictors, with the LoRA."""

import base64
import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import T5Config, T5EncoderModel

from lib.serving.client import request
from lib.serving.server import Server
from lib.storage.archive import extract_tar
from tests.clips_factory import data_uri
from tests.convert_factory import VAE_FILE, options, source
from tests.serving import wait_until_idle
from tests.video_decoding import decode

TOKENIZER = Path(__file__).resolve().parents[2] / "weights" / "tiny-t2v" / "tokenizer"
TEXT_WIDTH = 24
QUICK = {"prompt": "a fox", "num_inference_steps": 2, "seed": 3, "num_frames": 9}


def predict(server: Server, **inputs) -> tuple[bytes, dict]:
    wait_until_idle(server.url)
    _, body = request(server.url, "POST", "/predictions", {"input": inputs})
    reply = json.loads(body)
    assert reply["status"] == "succeeded", reply
    return base64.b64decode(reply["output"].split(",", 1)[1]), reply["metrics"]


@pytest.fixture(scope="module")
def folder(convert_server, export_server, tmp_path_factory) -> Path:
    """t2v and i2v models, converted with their VAE and completed with a random T5; and a LoRA for t2v."""
    folder = tmp_path_factory.mktemp("chain")
    for name, sat in {"t2v": "t2v-2b", "i2v": "i2v-5b", "second": "i2v-1.5-5b"}.items():
        overrides = ",".join(f"{key}={value}" for key, value in options(sat).items())
        files = {"transformer": data_uri(source(sat)), "vae": data_uri(VAE_FILE)}
        tar, _ = predict(convert_server, **files, overrides=overrides, dtype="float32")
        (folder / f"{name}.tar").write_bytes(tar)
        extract_tar(folder / f"{name}.tar", folder / name)
        add_text_encoder(folder / name)
    lora, _ = predict(export_server, lora=data_uri(source("lora-t2v-2b")), alpha=64)
    (folder / "lora.safetensors").write_bytes(lora)
    return folder


def add_text_encoder(model: Path) -> None:
    """A random T5 of the width that the transformers were made for, with the embedded models' tokenizer."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=1000, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(model / "text_encoder")
    shutil.copytree(TOKENIZER, model / "tokenizer")


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> str:
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def frames(video: bytes, path: Path) -> np.ndarray:
    path.write_bytes(video)
    return np.stack(list(decode(path).frames))


def test_a_converted_model_makes_videos_and_its_lora_changes_them(serve, folder, tmp_path):
    server = serve("t2v", environment={"COGVIDEOX_MODEL": str(folder / "t2v")})
    bare, metrics = predict(server, **QUICK)
    assert metrics["model"] == "t2v"
    assert frames(bare, tmp_path / "bare.mp4").shape == (9, 48, 64, 3)
    assert frames(bare, tmp_path / "bare.mp4").std() > 1
    lora = {"lora_weights": str(folder / "lora.safetensors")}
    styled, metrics = predict(server, **QUICK, **lora)
    assert (metrics["lora"], metrics["lora_scale"]) == ("lora.safetensors", 1)
    assert not np.array_equal(frames(styled, tmp_path / "a.mp4"), frames(bare, tmp_path / "b.mp4"))
    unstyled, _ = predict(server, **QUICK, **lora, lora_scale=0)
    assert np.array_equal(frames(unstyled, tmp_path / "a.mp4"), frames(bare, tmp_path / "b.mp4"))


@pytest.mark.slow
def test_a_converted_image_to_video_model_moves_a_picture(serve, folder, tmp_path):
    server = serve("i2v", environment={"COGVIDEOX_MODEL": str(folder / "i2v")})
    made = []
    for colour in ((250, 20, 20), (20, 20, 250)):
        video, metrics = predict(server, **QUICK, image=picture(colour))
        made.append(frames(video, tmp_path / "made.mp4"))
    assert metrics["model"] == "i2v" and made[0].shape == (9, 48, 64, 3)
    assert not np.array_equal(made[0], made[1])


@pytest.mark.slow
def test_a_converted_model_of_the_second_generation_makes_its_usual_length_either_way_up(
    serve, folder, tmp_path
):
    server = serve("i2v", environment={"COGVIDEOX_MODEL": str(folder / "second")})
    for width, height in ((64, 48), (48, 64)):
        given = {"prompt": "a fox", "num_inference_steps": 2, "seed": 3}
        video, _ = predict(server, **given, image=picture((250, 20, 20), (width, height)))
        assert frames(video, tmp_path / "made.mp4").shape == (17, height, width, 3)
