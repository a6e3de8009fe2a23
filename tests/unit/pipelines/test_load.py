from pathlib import Path

import pytest
import torch

from lib.memory.model import MemoryModel
from lib.models.specs import SPECS
from lib.pipelines.load import build_scheduler, load_pipeline, plan_memory
from lib.pipelines.machine import Machine

WEIGHTS = Path(__file__).resolve().parents[3] / "weights"
CPU = Machine(device="cpu", free_bytes=None, dtype="float32")


def load_tiny():
    spec, folder = SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v"
    return load_pipeline(spec, folder, CPU, plan_memory(spec, folder, CPU))


def test_component_sizes_are_what_the_loaded_parameters_take():
    sizes = MemoryModel.of(SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v", CPU).part_bytes()
    pipeline = load_tiny()
    for name in ("transformer", "vae", "text_encoder"):
        part = getattr(pipeline, name)
        loaded = sum(p.nbytes for p in part.parameters()) + sum(b.nbytes for b in part.buffers())
        assert sizes[name] == pytest.approx(loaded, rel=0.001), name
        assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_schedulers_are_built_from_the_checkpoints_settings():
    pipeline = load_tiny()
    original = pipeline.scheduler
    assert build_scheduler("default", original) is original
    for name, kind in (("ddim", "CogVideoXDDIMScheduler"), ("dpm", "CogVideoXDPMScheduler")):
        scheduler = build_scheduler(name, original)
        assert type(scheduler).__name__ == kind
        assert scheduler.config.timestep_spacing == "trailing"
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.beta_end == original.config.beta_end
