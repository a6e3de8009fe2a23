"""Speed levels compute the steps of their schedule, forecast the others, and leave nothing behind."""

import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from PIL import Image

from bench._levels import step_schedules
from lib.cancellation import Stopped
from lib.errors import UserError
from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.generation.step_cache import forecast as forecasting
from lib.generation.step_schedule import SPEEDS, steps_to_forecast
from lib.lora.attach import Loras
from lib.lora.source import Choice, parse
from lib.models.specs import SPECS
from tests.lora_factory import WEIGHTS, save_lora
from tests.unit.generation.test_second_family import save_pipeline
from tiny.evaluate import DEFAULTS, load_generator
from tiny.networks import SCHEDULER

STEPS = 14
"""Enough for the embedded models' fast level to forecast some."""


@pytest.fixture(scope="module")
def t2v():
    return load_generator(WEIGHTS / "tiny-t2v")


@pytest.fixture(scope="module")
def exact_frames(t2v):
    return t2v.frames(request_for())


def request_for(spec=SPECS["tiny-t2v"], **settings):
    inputs = {"prompt": "a green square moves up", "seed": 7, "num_inference_steps": STEPS}
    return build_request(spec, **DEFAULTS | inputs | settings)


def computed_calls(generator, request) -> tuple[np.ndarray, int]:
    """The frames, and how often the last block has really computed."""
    calls = []
    block = generator.pipeline.transformer.transformer_blocks[-1]
    hook = block.register_forward_hook(lambda *_: calls.append(1))
    try:
        return generator.frames(request), len(calls)
    finally:
        hook.remove()


def test_every_model_computes_the_first_two_steps_and_the_last():
    for spec in SPECS.values():
        counts = []
        for speed in SPEEDS:
            for steps in range(1, 101):
                forecast = steps_to_forecast(spec, speed, steps)
                assert list(forecast) == sorted(set(forecast) & set(range(2, steps - 1))), (
                    spec.name,
                    speed,
                    steps,
                )
            counts.append(50 - len(steps_to_forecast(spec, speed, 50)))
        assert counts == [50, spec.balanced.computed, spec.fast.computed]


def test_few_steps_are_all_computed_and_many_in_proportion():
    spec = SPECS["tiny-t2v"]
    own, most = spec.num_inference_steps, spec.fast.computed
    for steps in range(1, most + 1):
        assert steps_to_forecast(spec, "fast", steps) == ()
    for steps in range(most, own + 1):
        assert steps - len(steps_to_forecast(spec, "fast", steps)) == most
    assert 2 * own - len(steps_to_forecast(spec, "fast", 2 * own)) == 2 * most


def test_forecast_steps_lie_evenly_between_computed_ones():
    for spec in SPECS.values():
        for speed in ("balanced", "fast"):
            computed = sorted(set(range(50)) - set(steps_to_forecast(spec, speed, 50)))
            gaps = np.diff(computed)[getattr(spec, speed).first - 1 :]
            assert gaps.max() - gaps.min() <= 1, (spec.name, speed)


def test_an_unknown_level_is_refused_with_the_allowed_ones():
    with pytest.raises(UserError, match=r"^speed=turbo is unknown; allowed are exact, balanced, fast\.$"):
        request_for(speed="turbo")


class Steady(torch.nn.Module):
    """Sees a clean video in any noise, one that changes by the same amount from call to call."""

    def __init__(self, scheduler, dtype=torch.float32) -> None:
        super().__init__()
        self.config, self.scheduler, self.calls, self.dtype = (
            SimpleNamespace(out_channels=2),
            scheduler,
            [],
            dtype,
        )
        self.start, self.change = torch.randn(2, 1, 3, 2, 4, 4).unbind()

    def clean(self, call: int) -> torch.Tensor:
        return self.start + call * self.change

    def velocity(self, latents: torch.Tensor, timestep: torch.Tensor, call: int) -> torch.Tensor:
        signal = self.scheduler.alphas_cumprod[timestep]
        return (signal.sqrt() * latents - self.clean(call)) / (1 - signal).sqrt()

    def forward(self, hidden_states, timestep, call):
        self.calls.append(call)
        return (self.velocity(hidden_states[:, :, :2], timestep[0], call).to(self.dtype),)


def test_with_new_noise_in_every_step_the_last_clean_video_is_repeated():
    scheduler = CogVideoXDPMScheduler(**SCHEDULER)
    scheduler.set_timesteps(5)
    transformer = Steady(scheduler)
    with forecasting(SimpleNamespace(transformer=transformer, scheduler=scheduler), [2, 3]):
        for call, timestep in enumerate(scheduler.timesteps):
            states = torch.randn(1, 3, 2, 4, 4)
            out = transformer(hidden_states=states, timestep=timestep[None], call=call)[0]
            expected = transformer.velocity(states, timestep, 1 if call in (2, 3) else call)
            assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4), call


@pytest.mark.parametrize("channels", [2, 5], ids=["text", "image"])
def test_a_clean_video_that_changes_steadily_is_forecast_whatever_the_noise(channels):
    torch.manual_seed(0)
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(8)
    transformer = Steady(scheduler)
    pipeline = SimpleNamespace(transformer=transformer, scheduler=scheduler)
    with forecasting(pipeline, [2, 3, 5, 6]):
        for call, timestep in enumerate(scheduler.timesteps):
            states = torch.randn(1, 3, channels, 4, 4)  # an image's latents follow those that are denoised
            out = transformer(hidden_states=states, timestep=timestep[None], call=call)[0]
            expected = transformer.velocity(states[:, :, :2], timestep, call)
            assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4), call
    assert transformer.calls == [0, 1, 4, 7]


def test_a_forecast_is_of_the_models_type():
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(4)
    transformer = Steady(scheduler, dtype=torch.bfloat16)
    with forecasting(SimpleNamespace(transformer=transformer, scheduler=scheduler), [2]):
        for call, timestep in enumerate(scheduler.timesteps):
            states = torch.randn(1, 3, 2, 4, 4, dtype=torch.bfloat16)
            out = transformer(hidden_states=states, timestep=timestep[None], call=call)[0]
            assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_a_checkpoint_that_predicts_noise_is_refused_and_left_alone():
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER | {"prediction_type": "epsilon"})
    transformer = Steady(scheduler)
    with (
        pytest.raises(UserError, match="makes a epsilon; only speed=exact is supported without v_prediction"),
        forecasting(SimpleNamespace(transformer=transformer, scheduler=scheduler), [2]),
    ):
        pass
    assert "forward" not in vars(transformer)


@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 1.0}, {"scheduler": "dpm", "use_dynamic_cfg": True}]
)
@pytest.mark.parametrize("speed", ["balanced", "fast"])
def test_blocks_run_as_often_as_the_schedule_has_computed_steps(t2v, speed, settings):
    schedule = getattr(t2v.spec, speed)
    request = request_for(speed=speed, num_inference_steps=schedule.computed + 4, **settings)
    frames, computed = computed_calls(t2v, request)
    assert computed == schedule.computed
    assert np.array_equal(frames, t2v.frames(request))


def test_the_first_frame_of_image_to_video_stays_the_images():
    generator = load_generator(WEIGHTS / "tiny-i2v")
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    exact, fast = (
        generator.frames(request_for(generator.spec, image=image, speed=speed)) for speed in ("exact", "fast")
    )
    assert not np.array_equal(fast, exact)
    assert abs(fast[0].astype(float) - exact[0]).mean() < 2


def test_exact_stays_exact_after_every_level_even_a_stopped_or_failed_one(t2v, exact_frames, monkeypatch):
    transformer = t2v.pipeline.transformer
    for speed in ("balanced", "fast"):
        t2v.frames(request_for(speed=speed, num_inference_steps=30))
    stop = threading.Event()
    stopped = Generator(
        spec=t2v.spec, pipeline=t2v.pipeline, report=lambda line: stop.set() if " 8/" in line else None
    )
    with pytest.raises(Stopped):
        stopped.frames(request_for(speed="fast"), stop=stop)
    with monkeypatch.context() as broken:
        broken.setattr(t2v.pipeline.scheduler, "step", lambda *_, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            t2v.frames(request_for(speed="fast"))
    assert "forward" not in vars(transformer)
    assert np.array_equal(t2v.frames(request_for()), exact_frames)


def test_few_steps_are_the_same_at_every_level(t2v):
    frames = [t2v.frames(request_for(speed=speed, num_inference_steps=4)) for speed in SPEEDS]
    assert np.array_equal(frames[0], frames[1]) and np.array_equal(frames[0], frames[2])


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_lora_works_as_in_plain_diffusers_with_the_same_forecasts(
    tmp_path, monkeypatch, t2v, exact_frames, speed
):
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))
    file = save_lora(tmp_path / "lora.safetensors", alpha=8)
    request = request_for(speed=speed)
    loras = Loras(pipeline=t2v.pipeline, spec=t2v.spec, report=lambda line: None)
    with loras.applied([Choice(address=parse(str(file)), scale=0.7)]):
        frames = t2v.frames(request)
    assert np.array_equal(t2v.frames(request_for()), exact_frames)
    t2v.pipeline.unload_lora_weights()

    plain = CogVideoXPipeline.from_pretrained(WEIGHTS / "tiny-t2v")
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(file.parent, weight_name=file.name, adapter_name="plain")
    plain.set_adapters(["plain"], [0.7])
    with forecasting(plain, steps_to_forecast(t2v.spec, speed, STEPS)):
        video = plain(
            prompt=request.prompt,
            num_inference_steps=STEPS,
            num_frames=9,
            generator=torch.Generator().manual_seed(7),
            max_sequence_length=20,
        ).frames[0]
    assert np.array_equal(frames, np.stack([np.asarray(frame) for frame in video]))
    assert not np.array_equal(frames, exact_frames)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_second_family_is_forecast_too(tmp_path, task):
    save_pipeline(tmp_path / "second", task)
    generator = load_generator(tmp_path / "second")
    image = Image.effect_noise((64, 48), 60).convert("RGB") if task == "i2v" else None
    steps = generator.spec.fast.computed + 6
    exact, fast = (
        computed_calls(
            generator,
            request_for(generator.spec, image=image, speed=speed, num_inference_steps=steps, num_frames=17),
        )
        for speed in ("exact", "fast")
    )
    assert (exact[1], fast[1]) == (steps, steps - 6)
    assert psnr(fast[0], exact[0]) > 35


def test_compiled_blocks_are_not_compiled_again(t2v):
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    request = request_for(speed="fast")
    expected = t2v.frames(request)
    block = t2v.pipeline.transformer.transformer_blocks[0]
    block.compile(backend=count, fullgraph=True)
    try:
        for speed in ("exact", "fast", "exact", "fast"):
            frames = t2v.frames(request_for(speed=speed))
    finally:
        block._compiled_call_impl = None
    assert len(compiled) == 1
    assert psnr(frames, expected) > 50


class Placing(ModelHook):
    """Stands for accelerate's offloading, which wraps `forward` in the same way."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module, *args, **inputs):
        self.calls += 1
        return args, inputs


def test_offloading_is_used_in_computed_steps_alone_and_is_there_afterwards(t2v, exact_frames):
    transformer, hook = t2v.pipeline.transformer, Placing()
    add_hook_to_module(transformer, hook)
    wrapped = transformer.forward
    try:
        t2v.frames(request_for(speed="fast"))
        assert hook.calls == t2v.spec.fast.computed
        assert transformer.forward is wrapped
        assert np.array_equal(t2v.frames(request_for()), exact_frames)
        assert hook.calls == t2v.spec.fast.computed + STEPS
    finally:
        remove_hook_from_module(transformer)


def test_offloading_that_is_set_up_again_at_the_end_of_a_pipelines_call_stays(t2v, exact_frames):
    transformer, first, second = t2v.pipeline.transformer, Placing(), Placing()
    add_hook_to_module(transformer, first)
    try:
        with forecasting(t2v.pipeline, [2]):
            remove_hook_from_module(transformer)  # what maybe_free_model_hooks does
            add_hook_to_module(transformer, second)
        assert np.array_equal(t2v.frames(request_for()), exact_frames)
        assert (first.calls, second.calls) == (0, STEPS)
    finally:
        remove_hook_from_module(transformer)


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    error = np.mean((frames.astype(float) - reference) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def test_the_docs_list_the_computed_steps_of_every_model():
    page = (WEIGHTS.parent / "docs" / "speed.md").read_text()
    assert f"<!-- table step schedules -->\n{step_schedules()}<!-- end -->" in page
