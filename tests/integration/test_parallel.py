"""Two and four processes make the clip of one, in float32 over gloo."""

import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.cancellation import Stopped
from lib.distributed.layout import Layout
from lib.distributed.process_group import Group
from lib.distributed.shared_clip import Part, take_part
from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.lora.attach import Loras
from lib.lora.source import parse_choices
from tests.lora_factory import save_lora
from tests.parallel_factory import in_processes, save_model
from tiny.evaluate import DEFAULTS, load_generator

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
TOLERANCE = 1e-4
CFG, BOTH = Layout(branches=2), Layout(branches=2, sequence=2)
TWO, FOUR, TWICE_TWO = Layout(sequence=2), Layout(sequence=4), Layout(sequence=2, copies=2)

Case = tuple[Path, Layout, dict, Path | None]


@cache
def loaded(folder: Path) -> tuple[Generator, Loras]:
    generator = load_generator(folder)
    return generator, Loras(pipeline=generator.pipeline, spec=generator.spec, report=lambda line: None)


def alone_together_alone(group: Group, cases: list[Case]) -> list[tuple[np.ndarray, ...]]:
    """The latents of each case as all made them; of the first process also its own, and frames in 0..1."""
    return [_made(group, *case) for case in cases]


def _made(group: Group, folder: Path, layout: Layout, settings: dict, lora: Path | None) -> tuple:
    generator, loras = loaded(folder)
    pipeline = generator.pipeline
    image = Image.effect_noise((64, 48), 60).convert("RGB") if generator.spec.task == "i2v" else None
    asked = {"prompt": "a red circle moves right", "seed": 3, "num_inference_steps": 2, "image": image}
    request = build_request(generator.spec, **DEFAULTS | asked | settings)
    rest = {"lora_alpha": None, "extra_lora": "", "extra_lora_scale": 1.0, "extra_lora_alpha": None}
    chosen = parse_choices(lora_weights=str(lora or ""), lora_scale=0.8, **rest)
    with torch.inference_mode():
        embeddings = generator._prompts.encode(
            request.prompt, request.negative_prompt if request.guidance_scale > 1 else None
        )

    def alone() -> torch.Tensor:
        with loras.applied(chosen):
            return generator.latents(request, embeddings, check=lambda: None)

    part = Part(request=request, embeddings=embeddings, loras=tuple(chosen), layout=layout)
    if not group.is_first:
        return (take_part(part, generator=generator, loras=loras, group=group).numpy(),)
    before = alone()
    together = take_part(part, generator=generator, loras=loras, group=group)
    after = alone()
    with torch.inference_mode():
        frames = [pipeline.decode_latents(latents).add(1).div(2).numpy() for latents in (before, together)]
    return together.numpy(), before.numpy(), after.numpy(), *frames


def check(results: list[list[tuple]], cases: list[Case]) -> None:
    distances = []
    for nth in range(len(cases)):
        together, before, after, frames, frames_together = results[0][nth]
        assert np.array_equal(before, after)  # nothing of it is left
        assert frames.std() > 0.01
        distances.append(np.abs(frames - frames_together).max())
        for result in results[1:]:
            assert np.array_equal(result[nth][0], together)
    assert max(distances) <= TOLERANCE, distances


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "1.5": save_model(folder / "1.5", "t2v", second_family=True),
        "1.5-i2v": save_model(folder / "1.5-i2v", "i2v", second_family=True),
        "odd": save_model(folder / "odd", heads=11),
        "t2v": WEIGHTS / "tiny-t2v",
        "i2v": WEIGHTS / "tiny-i2v",
        "lora": save_lora(folder / "lora" / "lora.safetensors"),
    }


def test_two_processes_make_the_clip_of_one(models, tmp_path):
    cases = [
        (models["t2v"], CFG, {}, None),
        (models["t2v"], TWO, {}, None),
        (models["i2v"], CFG, {"use_dynamic_cfg": True, "scheduler": "dpm"}, None),
        (models["i2v"], TWO, {}, None),
        (models["t2v"], TWO, {"guidance_scale": 1.0}, None),
        (models["t2v"], CFG, {}, models["lora"]),
        (models["t2v"], TWO, {}, models["lora"]),
        (models["t2v"], CFG, {"speed": "fast", "num_inference_steps": 24}, None),
        (models["1.5"], TWO, {"num_frames": 17}, None),
        (models["1.5-i2v"], CFG, {"num_frames": 17}, None),
        (models["odd"], TWO, {}, None),
    ]
    check(in_processes(2, tmp_path, alone_together_alone, cases), cases)


def test_four_processes_make_the_clip_of_one(models, tmp_path):
    cases = [
        (models["i2v"], BOTH, {}, None),
        (models["t2v"], TWICE_TWO, {"guidance_scale": 1.0}, None),
        (models["1.5"], FOUR, {"num_frames": 17}, None),
        (models["odd"], FOUR, {"guidance_scale": 1.0}, None),
        (models["t2v"], BOTH, {}, models["lora"]),
    ]
    check(in_processes(4, tmp_path, alone_together_alone, cases), cases)


def stopped_at(group: Group, folder: Path) -> int:
    """The step after which every process stopped, because the first was told to."""
    generator = load_generator(folder)
    request = build_request(generator.spec, **DEFAULTS | {"prompt": "a red circle", "seed": 3})
    with torch.inference_mode():
        embeddings = generator._prompts.encode("a red circle", "")
    stop, steps = threading.Event(), 0

    def step() -> None:
        nonlocal steps
        group.check(stop)
        steps += 1
        if group.is_first and steps == 3:
            stop.set()

    with pytest.raises(Stopped), group.sharing(generator.pipeline.transformer, CFG):
        generator.latents(request, embeddings, check=step)
    return steps


def test_a_stop_is_heard_by_all_at_the_same_step(tmp_path):
    assert in_processes(2, tmp_path, stopped_at, WEIGHTS / "tiny-t2v") == [3, 3]
