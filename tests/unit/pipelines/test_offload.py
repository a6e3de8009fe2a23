"""Each plan on a CPU: components are moved as they would be on a GPU, and frames stay the same bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lib.errors import UserError
from lib.generation.generator import Generator
from lib.lora.attach import Loras
from lib.lora.source import Choice, parse
from lib.memory.model import OFFLOADS
from lib.memory.plan import plan_memory
from lib.models.specs import SPECS
from lib.pipelines.load import load_pipeline
from lib.pipelines.machine import Machine
from lib.pipelines.offload import offload_text_encoder, place
from tests.lora_factory import save_lora
from tests.unit.generation.test_generator import request_for

WEIGHTS = Path(__file__).resolve().parents[3] / "weights"
CPU = Machine(device="cpu", free_bytes=None, dtype="float32")


def generator_under(offload: str, name: str = "tiny-t2v") -> Generator:
    """The embedded model with its parts placed on a CPU as `offload` places them on a GPU."""
    spec, folder = SPECS[name], WEIGHTS / name
    pipeline = load_pipeline(spec, folder, CPU)
    place(pipeline, offload, device="cpu")
    return Generator(spec=spec, pipeline=pipeline, report=lambda line: None)


@pytest.fixture(scope="module")
def expected():
    return generator_under("resident").frames(request_for("tiny-t2v"))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_frames_are_the_same_bits_under_every_plan_and_again(offload, expected):
    generator = generator_under(offload)
    for _ in range(2):
        assert np.array_equal(generator.frames(request_for("tiny-t2v")), expected)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_lora_works_under_every_plan_and_leaves_the_base_unchanged(offload, tmp_path):
    lora = save_lora(tmp_path / "lora.safetensors")
    changed, *_ = frames_with(generator_under("resident"), "resident", lora)
    with_lora, after, removed, without = frames_with(generator_under(offload), offload, lora)
    assert np.array_equal(with_lora, changed)
    assert not np.array_equal(with_lora, without)
    assert np.array_equal(after, without)
    assert np.array_equal(removed, without)


def frames_with(generator: Generator, offload: str, lora: Path) -> tuple[np.ndarray, ...]:
    """With a LoRA, after it, when it has been detached, and before all that."""
    loras = Loras(pipeline=generator.pipeline, spec=generator.spec, offload=offload, report=lambda line: None)
    request = request_for("tiny-t2v", num_inference_steps=1)
    choice = Choice(address=parse(str(lora), trusted=True), scale=1.0)
    before = generator.frames(request)
    with loras.applied([choice]):
        with_lora = generator.frames(request)
    after = generator.frames(request)
    for adapter in list(loras._attached.values()):
        loras._detach(adapter.name)
    return with_lora, after, generator.frames(request), before


@pytest.mark.parametrize("offload", ["text", "model"])
def test_the_text_encoder_leaves_the_gpu_once_prompts_are_encoded(offload):
    generator = generator_under(offload)
    encoder, left = generator.pipeline.text_encoder, []
    encoder.to = lambda device: left.append(device)
    offload_text_encoder(generator.pipeline)
    assert left == ["cpu"]


@pytest.mark.parametrize("offload", ["resident", "group", "sequential"])
def test_other_plans_do_not_move_the_text_encoder_back(offload):
    generator = generator_under(offload)
    generator.pipeline.text_encoder.to = lambda device: pytest.fail("moved")
    offload_text_encoder(generator.pipeline)


def test_a_request_in_tiles_leaves_the_vae_untiled_afterwards():
    generator = generator_under("resident")
    vae, seen = generator.pipeline.vae, []
    vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32)
    vae.use_tiling = False
    tiled_decode = vae.tiled_decode
    vae.tiled_decode = lambda *args, **kwargs: (seen.append(1), tiled_decode(*args, **kwargs))[1]
    generator.plan = replace(plan_memory(generator.spec, WEIGHTS / "tiny-t2v", CPU), room=None, tiling=True)
    generator.frames(request_for("tiny-t2v"))
    assert seen
    assert not vae.use_tiling


def test_a_request_that_does_not_fit_is_refused_before_any_work():
    generator = generator_under("resident")
    generator.plan = replace(plan_memory(generator.spec, WEIGHTS / "tiny-t2v", CPU), room=10**6)
    generator.pipeline.encode_prompt = None
    with pytest.raises(UserError, match=r"num_frames=9 at 64x48 needs about 0\.\d GiB of system memory"):
        generator.frames(request_for("tiny-t2v"))
