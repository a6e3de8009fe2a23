from pathlib import Path

import pytest
import torch

from lib.memory.model import MemoryModel
from lib.models.specs import SPECS
from lib.pipelines.load import load_pipeline
from lib.pipelines.machine import Machine

WEIGHTS = Path(__file__).resolve().parents[3] / "weights"
CPU = Machine(device="cpu", free_bytes=None, dtype="float32")


def load_tiny():
    spec, folder = SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v"
    return load_pipeline(spec, folder, CPU)


def test_component_sizes_are_what_the_loaded_parameters_take():
    sizes = MemoryModel.of(SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v", CPU).part_bytes()
    pipeline = load_tiny()
    for name in ("transformer", "vae", "text_encoder"):
        part = getattr(pipeline, name)
        loaded = sum(p.nbytes for p in part.parameters()) + sum(b.nbytes for b in part.buffers())
        assert sizes[name] == pytest.approx(loaded, rel=0.001), name
        assert {p.dtype for p in part.parameters()} == {torch.float32}
