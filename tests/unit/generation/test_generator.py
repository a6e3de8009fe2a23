import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.generation.request import MAX_SEED, build_request
from lib.models.specs import SPECS
from tiny.evaluate import DEFAULTS, load_generator

WEIGHTS = Path(__file__).resolve().parents[3] / "weights"
PROMPT = "a green square moves up on a white background"


def request_for(name: str, **settings):
    inputs = DEFAULTS | {"prompt": PROMPT, "seed": 7, "num_inference_steps": 4} | settings
    return build_request(SPECS[name], **inputs)


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def t2v():
    return load_generator(WEIGHTS / "tiny-t2v")


@pytest.fixture(scope="module")
def i2v():
    return load_generator(WEIGHTS / "tiny-i2v")


def plain_frames(kind: type, folder: Path, request, scheduler: str = "default", **extra) -> np.ndarray:
    """Return the frames of plain diffusers."""
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler == "dpm":
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing"
        )
    video = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        use_dynamic_cfg=request.use_dynamic_cfg,
        num_frames=request.num_frames,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(request.seed),
        max_sequence_length=20,
        **extra,
    ).frames[0]
    return np.stack([np.asarray(frame) for frame in video])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a blue circle", "guidance_scale": 3.5},
        {"num_frames": 17, "seed": 0},
        {"use_dynamic_cfg": True, "scheduler": "dpm"},
    ],
)
def test_text_to_video_frames_are_plain_diffusers_frames_bit_for_bit(t2v, settings):
    request = request_for("tiny-t2v", **settings)
    expected = plain_frames(
        CogVideoXPipeline, WEIGHTS / "tiny-t2v", request, settings.get("scheduler", "default")
    )
    frames = t2v.frames(request)
    assert frames.shape == (request.num_frames, 48, 64, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, expected)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0, "seed": 3}, {"scheduler": "dpm"}])
def test_image_to_video_frames_are_plain_diffusers_frames_bit_for_bit(i2v, image, settings):
    request = request_for("tiny-i2v", image=image, **settings)
    expected = plain_frames(
        CogVideoXImageToVideoPipeline,
        WEIGHTS / "tiny-i2v",
        request,
        settings.get("scheduler", "default"),
        image=image,
    )
    assert np.array_equal(i2v.frames(request), expected)


def test_same_request_gives_same_frames_and_another_seed_others(t2v):
    first, again = t2v.frames(request_for("tiny-t2v")), t2v.frames(request_for("tiny-t2v"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, t2v.frames(request_for("tiny-t2v", seed=8)))


def test_a_scheduler_applies_to_its_request_only(t2v):
    before = t2v.frames(request_for("tiny-t2v"))
    dpm = t2v.frames(request_for("tiny-t2v", scheduler="dpm"))
    assert not np.array_equal(before, dpm)
    assert np.array_equal(before, t2v.frames(request_for("tiny-t2v")))


def test_every_stage_is_timed_and_every_step_reported(t2v):
    lines = []
    generator = type(t2v)(spec=t2v.spec, pipeline=t2v.pipeline, report=lines.append)
    generator.frames(request_for("tiny-t2v"))
    assert lines == [f"progress: denoising {i}/4" for i in (1, 2, 3, 4)]
    assert set(generator.timings) == {"text_encoding", "denoising", "decoding"}
    assert all(seconds > 0 for seconds in generator.timings.values())


def test_a_cut_prompt_is_reported(t2v):
    lines = []
    generator = type(t2v)(spec=t2v.spec, pipeline=t2v.pipeline, report=lines.append)
    generator.frames(request_for("tiny-t2v", prompt="red " * 30))
    assert "31 tokens; tiny-t2v reads the first 20" in lines[0]


def test_stopping_takes_effect_within_a_step_and_the_next_request_is_right(t2v):
    expected = t2v.frames(request_for("tiny-t2v"))
    stop, seen = threading.Event(), []

    def stop_at_the_second_step(line: str) -> None:
        seen.append(line)
        if len(seen) == 2:
            stop.set()

    generator = type(t2v)(spec=t2v.spec, pipeline=t2v.pipeline, report=stop_at_the_second_step)
    with pytest.raises(Stopped):
        generator.frames(request_for("tiny-t2v", num_inference_steps=50), stop=stop)
    assert len(seen) == 2
    assert np.array_equal(t2v.frames(request_for("tiny-t2v")), expected)


def test_stopping_after_the_last_step_takes_effect_before_decoding_ends(t2v):
    stop = threading.Event()

    def stop_at_the_last_step(line: str) -> None:
        if line.endswith("4/4"):
            stop.set()

    generator = type(t2v)(spec=t2v.spec, pipeline=t2v.pipeline, report=stop_at_the_last_step)
    with pytest.raises(Stopped):
        generator.frames(request_for("tiny-t2v"), stop=stop)
    assert not t2v.pipeline.vae.decoder._forward_pre_hooks


def test_components_also_leave_the_gpu_after_a_stopped_request(t2v, monkeypatch):
    freed, stop = [], threading.Event()
    monkeypatch.setattr(t2v.pipeline, "maybe_free_model_hooks", lambda: freed.append(True))
    stop.set()
    with pytest.raises(Stopped):
        t2v.frames(request_for("tiny-t2v"), stop=stop)
    assert freed


def test_latents_with_nan_are_an_error_instead_of_a_video(t2v, monkeypatch):
    monkeypatch.setattr(
        t2v.pipeline.scheduler, "step", lambda noise, t, latents, **options: (latents * float("nan"),)
    )
    with pytest.raises(RuntimeError, match="contain NaN or infinity in"):
        t2v.frames(request_for("tiny-t2v"))


def test_decoding_falls_back_to_tiles_for_one_request_when_memory_runs_out(t2v, monkeypatch):
    request = request_for("tiny-t2v")
    expected = t2v.frames(request)
    decode, calls, held = t2v.pipeline.decode_latents, [], []

    def first_call_fails(latents):
        calls.append(t2v.pipeline.vae.use_tiling)
        if len(calls) == 1:
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        assert held[0]() is None  # what the first try made is gone before the second begins
        return decode(latents)

    monkeypatch.setattr(t2v.pipeline, "decode_latents", first_call_fails)
    frames = t2v.frames(request)
    assert calls == [False, True]
    assert t2v.pipeline.vae.use_tiling is False
    assert np.array_equal(frames, expected)  # one tile covers a clip this small


def test_empty_settings_become_the_models_own():
    for name, spec in SPECS.items():
        if spec.task == "caption":
            continue
        image = Image.new("RGB", (spec.width, spec.height)) if spec.task == "i2v" else None
        request = build_request(spec, **DEFAULTS | {"prompt": "", "seed": None, "image": image})
        assert (request.num_frames, request.width, request.height, request.fps) == (
            spec.frames,
            spec.width,
            spec.height,
            spec.fps,
        ), name
        assert 0 <= request.seed < 2**32


def test_seed_zero_is_a_seed_and_seeds_out_of_range_are_refused():
    assert request_for("tiny-t2v", seed=0).seed == 0
    assert request_for("tiny-t2v", seed=MAX_SEED).seed == MAX_SEED
    with pytest.raises(UserError, match=r"seed=-1 is out of range.*\(nearest: 0\)"):
        request_for("tiny-t2v", seed=-1)
    with pytest.raises(UserError, match=rf"nearest: {MAX_SEED}"):
        request_for("tiny-t2v", seed=2**63)


def test_size_zero_is_refused_not_replaced_by_the_default():
    with pytest.raises(UserError, match="width=0, height=48"):
        request_for("tiny-t2v", width=0)


def test_an_image_sets_the_size_where_the_model_allows_several():
    portrait = Image.new("RGB", (900, 1600))
    request = request_for("cogvideox1.5-5b-i2v", image=portrait)
    assert (request.width, request.height) == (768, 1360)
    assert request.image.size == (768, 1360)
    given = request_for("cogvideox1.5-5b-i2v", image=portrait, width=1024, height=768)
    assert given.image.size == (1024, 768)


def test_a_files_metadata_has_everything_that_repeats_a_clip():
    request = request_for("tiny-t2v")
    changed = replace(request, seed=9)
    assert set(request.metadata()) >= {"seed", "num_inference_steps", "guidance_scale", "scheduler", "fps"}
    assert request.metadata() != changed.metadata()
