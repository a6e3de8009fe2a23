"""Settings resolved from base and machine, and refusals before anything is downloaded or computed."""

import importlib.util
import json
import socket
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from PIL import Image

from lib.errors import UserError
from lib.models.specs import SPECS
from tests.caption_factory import write_captioner
from tests.training_factory import LAYOUTS, config
from tiny.networks import SCHEDULER
from training import plan as module
from training.base import load_scheduler
from training.optimization import total_steps
from training.plan import (
    base_name,
    captioner_name,
    locate_base,
    resolve_plan,
    resolve_precision,
    validate,
)
from training.validation import validation_requests

WEIGHTS = Path(__file__).resolve().parents[3] / "weights"
TINY = WEIGHTS / "tiny-i2v"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)


@pytest.fixture
def installed(monkeypatch):
    """Which optional packages there are: none until a test puts names in."""
    found: set[str] = set()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: object() if name in found else None
    )
    return found


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def rejection(name: str = "tiny-i2v", device: str = "cpu", **settings) -> str:
    return refusal(validate, config(**settings), name, device)


def folder_of(tmp_path: Path, *, task: str = "i2v", in_channels: int = 32, layout: str = "5b-i2v") -> Path:
    """A base's folder as far as the plan reads it."""
    kind = {"i2v": "CogVideoXImageToVideoPipeline", "t2v": "CogVideoXPipeline"}[task]
    transformer = {
        "sample_frames": 49, "patch_size": 2, "max_text_seq_length": 226, "in_channels": in_channels,
        "out_channels": 16,
    }  # fmt: skip
    for part, content in {
        "model_index.json": {"_class_name": kind},
        "transformer/config.json": transformer | LAYOUTS[layout],
        "vae/config.json": {
            "block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4,
            "latent_channels": 16,
        },
    }.items():  # fmt: skip
        path = tmp_path / "my-base" / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return tmp_path / "my-base"


# The base


def test_the_base_is_cogvideox_model_or_the_embedded_one(monkeypatch):
    monkeypatch.delenv("COGVIDEOX_MODEL", raising=False)
    assert base_name() == "tiny-i2v"
    monkeypatch.setenv("COGVIDEOX_MODEL", "cogvideox-5b")
    assert base_name() == "cogvideox-5b"
    monkeypatch.setenv("COGVIDEOX_MODEL", "")
    assert base_name() == "tiny-i2v"


def test_a_captioning_model_is_refused_with_the_bases_that_exist():
    bases = [name for task in ("i2v", "t2v") for name in SPECS if SPECS[name].task == task]
    expected = (
        "COGVIDEOX_MODEL=cogvlm2-caption is a model for captioning; LoRAs are trained for image to video and "
        f"text to video, on {', '.join(bases)}."
    )
    assert rejection("cogvlm2-caption") == expected


# The captioner


def test_embedded_bases_use_the_embedded_captioner_and_others_the_released_one():
    assert (
        captioner_name(config().data, "tiny-i2v")
        == captioner_name(config().data, "tiny-t2v")
        == "tiny-caption"
    )
    assert (
        captioner_name(config().data, "cogvideox-5b")
        == captioner_name(config().data, "my-base")
        == "cogvlm2-caption"
    )
    assert captioner_name(config(autocaption=True, autocaption_model="me/own").data, "tiny-i2v") == "me/own"


def test_a_model_of_another_kind_is_refused_as_captioner():
    assert rejection(autocaption=True, autocaption_model="cogvideox-5b") == (
        "autocaption_model=cogvideox-5b is a model for text-to-video; clips are captioned by tiny-caption, "
        "cogvlm2-caption and models of that kind."
    )
    validate(config(autocaption=True), "cogvideox-5b", "cpu")


def test_a_captioners_folder_is_checked_where_local_sources_are_allowed(tmp_path, monkeypatch):
    settings = {"autocaption": True, "autocaption_model": str(tmp_path / "captioner")}
    refused = (
        f"autocaption_model='{tmp_path}/captioner' is neither a captioning model's name (tiny-caption, "
        "cogvlm2-caption) nor a Hub repository (owner/name)."
    )
    assert rejection(**settings) == refused
    write_captioner(tmp_path / "captioner")
    assert rejection(**settings) == refused
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    validate(config(**settings), "tiny-i2v", "cpu")
    (tmp_path / "captioner" / "config.json").write_text('{"architectures": ["CogVLMVideoForCausalLM"]}')
    assert "config.json is not that of a CogVLM2-Caption: 'vision_config' is missing" in rejection(**settings)
    assert rejection(autocaption=True, autocaption_model=str(TINY)) == (
        f"autocaption_model={TINY} is a model for image-to-video; clips are captioned by tiny-caption, "
        "cogvlm2-caption and models of that kind."
    )


@pytest.mark.parametrize("base", ["tiny-t2v", "cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b"])
def test_validation_images_are_refused_where_videos_come_from_text(base):
    settings = {"validation_prompt": "a star", "validation_images": ["a.png"]}
    assert rejection(base, **settings) == (
        f"validation_images were given, but {base} makes videos from text alone; leave them out."
    )
    validate(config(validation_prompt="a star:::another"), base, "cpu")


@pytest.mark.parametrize("base", ["tiny-i2v", "cogvideox-5b-i2v", "cogvideox1.5-5b-i2v"])
@pytest.mark.parametrize(("prompts", "images"), [("a star", []), ("a ::: b", ["a.png"]), ("a", ["1", "2"])])
def test_image_to_video_needs_an_image_for_each_validation_prompt(base, prompts, images):
    count = len(prompts.split(":::"))
    assert rejection(base, validation_prompt=prompts, validation_images=images) == (
        f"validation needs an image for each prompt, as {base} starts from images; prompts given: {count} "
        f"(validation_prompt, separated by ':::'), validation_images given: {len(images)}."
    )
    validate(config(validation_prompt="a:::b", validation_images=["1", "2"]), base, "cpu")


def test_a_folder_is_checked_as_a_known_base_is(monkeypatch):
    images = {"validation_prompt": "a", "validation_images": ["a.png"]}
    t2v = str(WEIGHTS / "tiny-t2v")
    assert "makes videos from text alone" in refusal(locate_base, t2v, config(**images).validation, print)
    assert "makes videos from text alone" in rejection(t2v, **images)
    assert "(nearest: width=64, height=48)." in rejection(t2v, width=128)
    assert "max_num_frames=50 is out of range" in rejection(str(TINY), max_num_frames=50)
    monkeypatch.chdir(WEIGHTS)
    assert "nearest: width=64" in rejection("./tiny-i2v", width=128)
    validate(config(max_num_frames=25), str(TINY), "cpu")
    assert locate_base(str(TINY), config().validation, print) == TINY
    assert locate_base("tiny-i2v", config().validation, print) == TINY


@pytest.mark.parametrize(
    ("task", "in_channels", "other", "wanted"),
    [("i2v", 16, "text-to-video", 32), ("t2v", 32, "image-to-video", 16), ("i2v", 48, "text-to-video", 32)],
)
def test_a_transformer_of_the_other_kind_is_refused(tmp_path, task, in_channels, other, wanted):
    folder = folder_of(tmp_path, task=task, in_channels=in_channels)
    kind = {"i2v": "image-to-video", "t2v": "text-to-video"}[task]
    message = refusal(resolve_plan, config(), str(folder), folder, "cpu")
    assert message == (
        f"{folder} is set up for {kind}, which takes {wanted} input channels, but its transformer has "
        f"{in_channels}: it is a model for {other}. Give a base of the right kind."
    )


# Sizes and lengths


@pytest.mark.parametrize(
    ("base", "settings", "nearest"),
    [
        ("tiny-i2v", {"width": 128}, "(nearest: width=64, height=48)."),
        ("cogvideox-5b-i2v", {"width": 480, "height": 720}, "(nearest: width=720, height=480)."),
        ("cogvideox-5b", {"width": 641, "height": 350}, "(nearest: width=640, height=352)."),
        ("cogvideox1.5-5b-i2v", {"width": 800, "height": 600}, "(nearest: width=1024, height=768)."),
        ("cogvideox-2b", {"height": 484}, "(nearest: width=720, height=480)."),
    ],
)
def test_unsupported_sizes_are_refused_before_a_download(base, settings, nearest):
    assert rejection(base, **settings).endswith(nearest)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("cogvideox-5b", {"width": 480, "height": 720}),
        ("cogvideox1.5-5b-i2v", {"width": 768, "height": 1360}),
        ("cogvideox1.5-5b", {"width": 512, "height": 512}),
        ("cogvideox-5b-i2v", {"width": 720, "height": 480}),
        ("tiny-t2v", {"max_num_frames": 49}),
        ("cogvideox1.5-5b", {"max_num_frames": 161}),
        ("cogvideox-5b", {"max_num_frames": 20}),
    ],
)
def test_supported_sizes_and_lengths_are_accepted(base, settings):
    validate(config(**settings), base, "cpu")


@pytest.mark.parametrize(
    ("base", "frames", "message"),
    [
        (
            "cogvideox-5b",
            8,
            "is out of range for cogvideox-5b: use 9 to 49 (nearest: 9), or leave it empty for 49.",
        ),
        ("tiny-i2v", 50, "is out of range for tiny-i2v: use 9 to 49 (nearest: 49), or leave it empty for 9."),
        (
            "cogvideox1.5-5b-i2v",
            16,
            "is out of range for cogvideox1.5-5b-i2v: use 17 to 161 (nearest: 17), or leave it empty for 81.",
        ),
    ],
)
def test_lengths_out_of_range_are_refused_before_a_download(base, frames, message):
    assert rejection(base, max_num_frames=frames) == f"max_num_frames={frames} {message}"


def test_a_folder_is_checked_against_its_own_sizes(tmp_path):
    folder = folder_of(tmp_path)
    message = refusal(resolve_plan, config(width=640, height=480), str(folder), folder, "cpu")
    assert message.endswith("(nearest: width=720, height=480).")
    assert "max_num_frames=50 is out of range for my-base: use 9 to 49" in refusal(
        resolve_plan, config(max_num_frames=50), str(folder), folder, "cpu"
    )


# The machine


@pytest.mark.parametrize("optimizer", ["adam_8bit", "adamw_8bit"])
def test_8_bit_optimizers_need_a_gpu_and_their_package(installed, optimizer):
    plain = optimizer.removesuffix("_8bit")
    assert rejection(optimizer=optimizer) == (
        f"optimizer={optimizer} needs an NVIDIA GPU; on this CPU use {plain}."
    )
    assert rejection(optimizer=optimizer, device="cuda") == (
        f"{optimizer} needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
    )
    installed.add("bitsandbytes")
    validate(config(optimizer=optimizer), "tiny-i2v", "cuda")


def test_missing_packages_are_named(installed, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    needs = "needs the package {}, which is not installed: pip install {}"
    assert rejection(optimizer="prodigy") == "prodigy " + needs.format("prodigyopt", "prodigyopt")
    assert rejection(report_to="tensorboard") == "tensorboard " + needs.format("tensorboard", "tensorboard")
    assert rejection(report_to="wandb", wandb_api_key="k") == "wandb " + needs.format("wandb", "wandb")
    installed.add("tensorboard")
    assert rejection(report_to="all", wandb_api_key="k") == "wandb " + needs.format("wandb", "wandb")
    validate(config(report_to="tensorboard"), "tiny-i2v", "cpu")


def test_wandb_needs_a_key_or_its_own_setup(installed, monkeypatch, tmp_path):
    installed.add("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert rejection(report_to="wandb") == "report_to=wandb needs wandb_api_key (or WANDB_API_KEY)."
    validate(config(report_to="wandb", wandb_api_key="key"), "tiny-i2v", "cpu")
    monkeypatch.setenv("WANDB_MODE", "offline")
    validate(config(report_to="wandb"), "tiny-i2v", "cpu")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    validate(config(report_to="wandb"), "tiny-i2v", "cpu")


def test_fp16_needs_a_gpu():
    assert (
        rejection(mixed_precision="fp16") == "mixed_precision=fp16 needs a GPU; on this CPU use no or bf16."
    )
    validate(config(mixed_precision="fp16"), "tiny-i2v", "cuda")
    validate(config(mixed_precision="bf16"), "tiny-i2v", "cpu")


@pytest.mark.parametrize(
    ("asked", "device", "supported", "expected"),
    [
        ("auto", "cpu", False, "no"),
        ("bf16", "cpu", False, "bf16"),
        ("no", "cuda", True, "no"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("fp16", "cuda", True, "fp16"),
    ],
)
def test_precision_follows_from_the_device_unless_given(monkeypatch, asked, device, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert resolve_precision(config(mixed_precision=asked).compute, device) == expected


@pytest.mark.parametrize(
    ("device", "asked", "dtype"),
    [("cpu", "bf16", "float32"), ("cpu", "no", "float32"), ("cuda", "no", "float32"),
     ("cuda", "fp16", "float16"), ("cuda", "bf16", "bfloat16")],
)  # fmt: skip
def test_the_frozen_base_has_its_compute_type_except_on_a_cpu(device, asked, dtype):
    assert resolve_plan(config(mixed_precision=asked), "tiny-i2v", TINY, device).dtype == getattr(
        torch, dtype
    )


# What is resolved


def test_empty_settings_become_the_bases_own():
    plan = resolve_plan(config(), "tiny-i2v", TINY, "cpu")
    assert (plan.base, plan.folder, plan.spec, plan.is_i2v) == ("tiny-i2v", TINY, SPECS["tiny-i2v"], True)
    assert (plan.device, plan.precision, plan.gradient_checkpointing) == ("cpu", "no", False)
    sampling = plan.sampling
    assert (sampling.fps, sampling.frame_step, sampling.max_frames) == (8, 8, 9)
    assert (sampling.width, sampling.height, sampling.fit) == (64, 48, "center")
    assert (sampling.random_crops, sampling.flip, sampling.seed) == (1, False, 0)
    assert resolve_plan(config(), "tiny-i2v", TINY, "cuda").gradient_checkpointing


def test_given_settings_are_kept():
    plan = resolve_plan(
        config(
            fps=12, max_num_frames=33, gradient_checkpointing=True, random_flip=0.5, seed=0,
            video_reshape_mode="random", random_crops=3, skip_frames_start=2, skip_frames_end=1,
            long_clips="cut",
        ),
        "tiny-i2v", TINY, "cpu",
    )  # fmt: skip
    assert plan.gradient_checkpointing and plan.seed == 0
    sampling = plan.sampling
    assert (sampling.fps, sampling.max_frames, sampling.fit, sampling.random_crops) == (12, 33, "random", 3)
    assert (sampling.flip, sampling.long_clips, sampling.seed) == (True, "cut", 0)
    assert (sampling.skip_frames_start, sampling.skip_frames_end) == (2, 1)
    assert not resolve_plan(
        config(gradient_checkpointing=False), "tiny-i2v", TINY, "cuda"
    ).gradient_checkpointing


@pytest.mark.parametrize("mode", ["center", "random"])
def test_the_seed_does_not_change_what_is_encoded(mode):
    first, second = (
        resolve_plan(config(seed=seed, video_reshape_mode=mode), "tiny-i2v", TINY, "cpu").sampling
        for seed in (1, 2)
    )
    assert first == second


def test_fp8_turns_checkpointing_on_and_is_refused_without():
    assert resolve_plan(config(base_precision="fp8"), "tiny-i2v", TINY, "cpu").gradient_checkpointing
    with pytest.raises(UserError, match="base_precision=fp8 saves nothing with gradient_checkpointing=false"):
        validate(config(base_precision="fp8", gradient_checkpointing=False), "tiny-i2v", "cpu")


def test_an_empty_seed_is_a_random_one():
    seeds = {resolve_plan(config(), "tiny-i2v", TINY, "cpu").seed for _ in range(5)}
    assert len(seeds) > 1 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_folder_is_recorded_by_name_without_its_path(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, layout="1.5-5b-i2v")
    plan = resolve_plan(config(), str(folder), folder, "cpu")
    assert plan.base == "my-base"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_plan(config(), "~/my-base", folder, "cpu").base == "my-base"
    assert (plan.sampling.width, plan.sampling.height, plan.sampling.frame_step) == (1360, 768, 16)
    hub = resolve_plan(config(), "owner/star@v1", folder, "cpu")
    assert hub.base == "owner/star@v1"


def test_steps_are_given_or_follow_from_epochs_rounded_up():
    assert total_steps(config().optimizer, 20, 4) == 1500
    assert total_steps(config(max_train_steps=7).optimizer, 20, 4) == 7
    assert total_steps(config(num_train_epochs=3).optimizer, 20, 4) == 15
    assert total_steps(config(num_train_epochs=3).optimizer, 7, 4) == 6
    assert total_steps(config(num_train_epochs=1).optimizer, 1, 64) == 1


def test_trackers_by_name():
    asked = {
        name: config(report_to=name).publishing.trackers for name in ("none", "tensorboard", "wandb", "all")
    }
    assert asked == {
        "none": [], "tensorboard": ["tensorboard"], "wandb": ["wandb"], "all": ["tensorboard", "wandb"]
    }  # fmt: skip
    assert set(module.LIBRARIES) >= {"tensorboard", "wandb", "prodigy", "adam_8bit", "adamw_8bit"}


# Validation clips


def test_validation_clips_are_requests_of_the_service_each_with_its_own_seed(tmp_path):
    paths = []
    for name, colour in (("a.png", (200, 0, 0)), ("b.png", (0, 200, 0))):
        paths.append(str(tmp_path / name))
        Image.new("RGB", (128, 96), colour).save(paths[-1])
    settings = config(
        validation_prompt="a star:::a moon", validation_images=paths, num_validation_videos=2,
        max_num_frames=20, guidance_scale=3, validation_inference_steps=4, fps=12, seed=40,
    )  # fmt: skip
    plan = resolve_plan(settings, "tiny-i2v", TINY, "cpu")
    requests = validation_requests(settings.validation, plan)
    assert [request.prompt for request in requests] == ["a star", "a star", "a moon", "a moon"]
    assert [request.seed for request in requests] == [40, 41, 42, 43]
    assert [request.image.getpixel((5, 5))[:2] for request in requests] == [(200, 0)] * 2 + [(0, 200)] * 2
    for request in requests:
        assert (request.num_frames, request.width, request.height, request.fps) == (17, 64, 48, 12)
        assert (request.guidance_scale, request.num_inference_steps, request.scheduler) == (3, 4, "default")
        assert request.image.size == (64, 48) and request.negative_prompt == ""


def test_without_prompts_there_are_no_validation_clips_and_a_bad_image_is_named(tmp_path):
    plan = resolve_plan(config(), "tiny-i2v", TINY, "cpu")
    assert validation_requests(config().validation, plan) == []
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    settings = config(validation_prompt="a star", validation_images=[str(bad)])
    with pytest.raises(UserError, match=r"validation image bad\.png") as caught:
        validation_requests(settings.validation, plan)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_the_scheduler_is_the_bases_own_with_its_noise(tmp_path, kind):
    original = kind(**SCHEDULER | {"snr_shift_scale": 3.0})
    original.save_pretrained(tmp_path / "scheduler")
    loaded = load_scheduler(tmp_path)
    assert type(loaded) is kind
    assert torch.equal(loaded.alphas_cumprod, original.alphas_cumprod)
    assert loaded.config.prediction_type == "v_prediction" and loaded.alphas_cumprod[-1] == 0
