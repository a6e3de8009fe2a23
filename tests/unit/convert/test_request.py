"""The inputs of a conversion are checked, and a fitting text encoder is found or downloaded."""

import json
from pathlib import Path

import pytest
import torch

from lib.convert.request import lora_request, model_request, parse_overrides
from lib.convert.text_encoder import find_text_encoder
from lib.errors import UserError
from tests.convert_factory import sat_transformer, save_sat, silent
from tests.http_host import Host, hub_of

INPUTS = {
    "direction": "to_diffusers", "family": "auto", "dtype": "auto", "vae_dtype": "auto",
    "text_encoder": False, "overrides": "", "hub_repository": "", "hub_token": None,
}  # fmt: skip


def test_auto_becomes_none_and_a_token_is_not_shown():
    request = model_request(INPUTS | {"hub_token": "hf_secret"}, has_transformer=True, has_vae=False)
    assert (request.family, request.dtype, request.vae_dtype, request.options) == (None, None, None, {})
    assert request.repository() is None and "hf_secret" not in repr(request)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        (" sample_frames=49,norm_num_groups = 2,", {"sample_frames": 49, "norm_num_groups": 2}),
        ("scaling_factor=0.7\nsnr_shift_scale=3.0", {"scaling_factor": 0.7, "snr_shift_scale": 3.0}),
        ("invert_scale_latents=True", {"invert_scale_latents": True}),
    ],
)
def test_overrides_are_pairs(text, found):
    read = parse_overrides(text)
    assert read == found and [type(value) for value in read.values()] == [type(v) for v in found.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample_frames", "overrides: 'sample_frames' is not name=value; allowed are sample_height, "),
        ("sample_frames=many", "overrides: sample_frames=many is not a number."),
        ("scaling_factor=inf", "overrides: scaling_factor=inf is not a number."),
        ("layers=3", "layers=3 cannot be overridden; allowed are sample_height, "),
        ("sample_frames=-1", "sample_frames=-1 is not supported; it has to be a number above 0."),
    ],
)
def test_invalid_overrides_are_refused(text, message):
    with pytest.raises(UserError) as caught:
        parse_overrides(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "to_sat", "family": "cogvideox-2b"}, "family=cogvideox-2b applies only to"),
        ({"direction": "to_sat", "vae_dtype": "float16"}, "vae_dtype=float16 applies only to"),
        ({"direction": "to_sat", "text_encoder": True}, "text_encoder=true applies only to"),
    ],
)
def test_inputs_of_one_direction_are_refused_with_the_other(changes, message):
    with pytest.raises(UserError) as caught:
        model_request(INPUTS | changes, has_transformer=True, has_vae=False)
    assert str(caught.value) == f"{message} direction=to_diffusers; leave it out."


def test_a_request_without_files_and_a_text_encoder_without_a_transformer_are_refused():
    with pytest.raises(UserError, match=r"^Give a transformer, a VAE or both: "):
        model_request(INPUTS, has_transformer=False, has_vae=False)
    with pytest.raises(UserError, match=r"^text_encoder=true needs a transformer"):
        model_request(INPUTS | {"text_encoder": True}, has_transformer=False, has_vae=True)
    lora = {"direction": "to_diffusers", "alpha": None, "dtype": "auto"}
    with pytest.raises(UserError, match=r"^Give a LoRA: "):
        lora_request(lora, has_lora=False)
    for alpha in (0, -1, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"is not supported; it has to be a number above 0"):
            lora_request(lora | {"alpha": alpha}, has_lora=True)


# The text encoder


@pytest.fixture
def released(monkeypatch, tmp_path):
    """A Hub with the released repository in small: the text encoder, and what is not needed."""
    index = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "X"]}
    files = {
        "model_index.json": json.dumps(index).encode(),
        "text_encoder/config.json": json.dumps({"d_model": 4096}).encode(),
        "text_encoder/model.safetensors": bytes(range(256)) * 8,
        "tokenizer/spiece.model": b"pieces",
        "transformer/config.json": b"{}",
        "transformer/diffusion_pytorch_model.safetensors": b"w" * 2000,
    }
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))
    with Host(hub_of("zai-org/CogVideoX-2b", files, commit="a" * 40)) as host:
        monkeypatch.setenv("HF_ENDPOINT", host.address)
        yield host


def transformer(tmp_path: Path, **changes) -> Path:
    return save_sat(tmp_path / "transformer.pt", sat_transformer(**changes))


def test_the_text_encoder_is_downloaded_without_the_rest_and_once(released, tmp_path):
    path = transformer(tmp_path, text_embed_dim=4096)
    first, again = (find_text_encoder(path, None, report=silent) for _ in range(2))
    assert first == again
    assert sorted(file.name for file in first.rglob("*") if file.is_file()) == [
        "config.json", "model.safetensors", "spiece.model",
    ]  # fmt: skip
    asked = [path for path, *_ in released.requests]
    assert not any("/transformer/" in path for path in asked)
    assert len([path for path in asked if path.startswith("/api/")]) == 1


def test_another_width_than_the_released_one_is_refused(released, tmp_path):
    with pytest.raises(UserError) as caught:
        find_text_encoder(transformer(tmp_path), None, report=silent)
    assert str(caught.value) == (
        "transformer.pt was made for a text encoder of width 24, but the released one has 4096: "
        "text_encoder=true is not supported. Copy its own text encoder into the result."
    )
    assert released.requests == []


def test_no_text_encoder_is_sought_for_another_model(released, tmp_path):
    torch.save({"module": {"input_blocks.0.0.weight": torch.zeros(2)}}, tmp_path / "unet.pt")
    assert find_text_encoder(tmp_path / "unet.pt", None, report=silent) is None


def test_a_forbidden_download_is_an_error(released, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lib.network.offline._offline_by_us", False)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids the download; unset it once"):
        find_text_encoder(transformer(tmp_path, text_embed_dim=4096), None, report=silent)
    assert released.requests == []
