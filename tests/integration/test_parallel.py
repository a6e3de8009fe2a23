"""Several processes denoise a clip with the result of one process, in float32 over gloo."""

import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lib.cancellation import Stopped
from lib.distributed.layout import Layout
from lib.distributed.messages import DenoisingJob, Embeddings, ModelSetup
from lib.distributed.process_group import ProcessGroup
from lib.distributed.worker import run_job
from lib.distributed.worker_pool import WorkerPool, create_pool
from lib.generation.generator import Generator
from lib.generation.request import Request, build_request
from lib.lora.attach import Loras
from lib.lora.source import take_choices
from lib.memory.plan import plan_memory
from lib.models.specs import SPECS
from lib.pipelines.machine import inspect_machine
from tests.lora_factory import save_lora
from tests.parallel_factory import in_processes, save_model
from tiny.evaluate import DEFAULTS, load_generator

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
TOLERANCE = 1e-4
"""Largest difference of decoded frames in 0..1, before they are rounded and encoded."""
CFG, BOTH = Layout(branches=2), Layout(branches=2, sequence=2)
TWO, FOUR, TWICE_TWO = Layout(sequence=2), Layout(sequence=4), Layout(sequence=2, copies=2)

Case = tuple[Path, Layout, dict, Path | None]


@cache
def loaded(folder: Path) -> tuple[Generator, Loras]:
    generator = load_generator(folder)
    return generator, Loras(pipeline=generator.pipeline, spec=generator.spec, report=lambda line: None)


def red_circle() -> Image.Image:
    """A first frame such as the model was trained on: from noise it would amplify rounding."""
    image = Image.new("RGB", (64, 48))
    ImageDraw.Draw(image).ellipse((10, 16, 26, 32), fill="red")
    return image


def prepared(generator: Generator, **inputs) -> tuple[Request, Embeddings]:
    """A request and the embeddings of its prompts."""
    image = red_circle() if generator.spec.task == "i2v" else None
    defaults = {"prompt": "a red circle moves right", "seed": 3, "num_inference_steps": 2, "image": image}
    request = build_request(generator.spec, **DEFAULTS | defaults | inputs)
    negative = request.negative_prompt if request.guided else None
    with torch.inference_mode():
        return request, generator._prompts.encode(request.prompt, negative)


def decoded(generator: Generator, latents: torch.Tensor) -> np.ndarray:
    """Frames from 0 to 1."""
    with torch.inference_mode():
        return generator.pipeline.decode_latents(latents).add(1).div(2).numpy()


def alone_shared_alone(group: ProcessGroup, cases: list[Case]) -> list[tuple[np.ndarray, ...]]:
    """The shared latents of each case; from the first process also its own before and after, and frames."""
    return [_computed(group, *case) for case in cases]


def _computed(group: ProcessGroup, folder: Path, layout: Layout, inputs: dict, lora: Path | None) -> tuple:
    generator, loras = loaded(folder)
    choices = take_choices({"lora_weights": str(lora), "lora_scale": 0.8} if lora else {})
    request, embeddings = prepared(generator, **inputs)

    def alone() -> torch.Tensor:
        with loras.applied(choices):
            return generator.latents(request, embeddings, check=lambda: None)

    job = DenoisingJob(request=request, loras=choices, embeddings=embeddings, layout=layout)
    if not group.is_first:
        return (run_job(job, generator=generator, loras=loras, group=group).numpy(),)
    before = alone()
    shared = run_job(job, generator=generator, loras=loras, group=group)
    after = alone()
    frames = [decoded(generator, latents) for latents in (before, shared)]
    return shared.numpy(), before.numpy(), after.numpy(), *frames


def check(results: list[list[tuple]], cases: list[Case]) -> None:
    distances = []
    for nth in range(len(cases)):
        shared, before, after, frames, shared_frames = results[0][nth]
        assert np.array_equal(before, after)  # the transformer is as it was
        assert frames.std() > 0.01
        distances.append(np.abs(frames - shared_frames).max())
        for result in results[1:]:
            assert np.array_equal(result[nth][0], shared)
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


@pytest.mark.slow
def test_two_processes_compute_the_frames_of_one(models, tmp_path):
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
    check(in_processes(2, tmp_path, alone_shared_alone, cases), cases)


@pytest.mark.slow
def test_four_processes_compute_the_frames_of_one(models, tmp_path):
    cases = [
        (models["i2v"], BOTH, {}, None),
        (models["t2v"], TWICE_TWO, {"guidance_scale": 1.0}, None),
        (models["1.5"], FOUR, {"num_frames": 17}, None),
        (models["odd"], FOUR, {"guidance_scale": 1.0}, None),
        (models["t2v"], BOTH, {}, models["lora"]),
    ]
    check(in_processes(4, tmp_path, alone_shared_alone, cases), cases)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """This process and a worker, as a server starts them."""
    spec, folder = SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v"
    machine = inspect_machine(spec)
    setup = ModelSetup(
        spec=spec, folder=folder, machine=machine, plan=plan_memory(spec, folder, machine, forced=None)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COGVIDEOX_PARALLEL", "2")
        pool = create_pool(setup)
    assert pool is not None
    pool.start()
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("inputs", "layout"),
    [
        ({"num_inference_steps": 3}, "cfg2"),
        ({"num_inference_steps": 3, "guidance_scale": 1.0}, "ulysses2"),
        ({"num_inference_steps": 24, "speed": "fast"}, "cfg2"),
    ],
)
def test_a_worker_pool_computes_the_frames_of_one_process(pool, inputs, layout):
    generator, _ = loaded(WEIGHTS / "tiny-t2v")
    request, embeddings = prepared(generator, **inputs)
    alone = generator.latents(request, embeddings, check=lambda: None)
    assert str(pool.plan.layout(guided=request.guided)) == layout
    transformer = generator.pipeline.transformer
    with pool.shared_denoising(request, embeddings, None, loras=[], transformer=transformer) as check:
        shared = generator.latents(request, embeddings, check=check)
    assert np.abs(decoded(generator, shared) - decoded(generator, alone)).max() <= TOLERANCE


def stopped_at(group: ProcessGroup, folder: Path) -> int:
    """The step after which every process stopped, because the stop of the first was set."""
    generator = load_generator(folder)
    request, embeddings = prepared(generator, num_inference_steps=50)
    stop, steps = threading.Event(), 0

    def step() -> None:
        nonlocal steps
        group.check_stop(stop)
        steps += 1
        if group.is_first and steps == 3:
            stop.set()

    with pytest.raises(Stopped), group.shared_forward(generator.pipeline.transformer, CFG):
        generator.latents(request, embeddings, check=step)
    return steps


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step(tmp_path):
    assert in_processes(2, tmp_path, stopped_at, WEIGHTS / "tiny-t2v") == [3, 3]
