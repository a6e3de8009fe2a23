"""What is compiled at a server's start; test_lora_matrix.py holds compiled blocks to plain ones."""

from dataclasses import replace

import pytest

from lib.compilation import warm_up
from lib.memory.machine import Machine
from lib.pipelines import plan_memory
from tests.lora_factory import WEIGHTS
from tiny.evaluate import load_generator


@pytest.mark.parametrize(("frames", "latent_frames"), [(None, 3), (17, 5)])
def test_warming_up_takes_one_guided_step_of_the_length_there_is_room_for(frames, latent_frames):
    generator = load_generator(WEIGHTS / "tiny-t2v")
    machine = Machine(device="cpu", free_bytes=None, dtype="float32")
    plan = plan_memory(generator.spec, WEIGHTS / "tiny-t2v", machine)
    generator.plan = replace(plan, frames=frames)
    lines, shapes = [], []
    generator.report = lines.append
    generator.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["hidden_states"].shape)), with_kwargs=True
    )
    warm_up(generator)
    assert [shape[:2] for shape in shapes] == [(2, latent_frames)]
    assert lines == []
    generator.report("heard again")
    assert lines == ["heard again"]
