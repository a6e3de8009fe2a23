from pathlib import Path

import pytest
import torch

from lib.errors import UserError
from lib.models import SPECS
from lib.pipelines import GIB, Machine, build_scheduler, component_bytes, load_pipeline, plan_memory

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
CPU = Machine(device="cpu", free_bytes=0, dtype="float32")


def gpu(gigabytes: float) -> Machine:
    return Machine(device="cuda", free_bytes=int(gigabytes * GIB), dtype="bfloat16")


@pytest.fixture
def five_b(monkeypatch):
    """5B's published sizes, without 21 GB of files."""
    sizes = {"transformer": int(11.1e9), "text_encoder": int(9.5e9), "vae": int(0.4e9)}
    monkeypatch.setattr("lib.pipelines.component_bytes", lambda folder, dtype: sizes)


@pytest.mark.parametrize(
    ("name", "free", "offload", "tiling"),
    [
        ("cogvideox-5b", 139, "resident", False),
        ("cogvideox-5b", 79, "resident", False),
        ("cogvideox-5b", 39, "resident", False),
        ("cogvideox-5b", 31, "resident", True),
        ("cogvideox-5b", 23, "model", True),
        ("cogvideox-5b", 15, "model", True),
        ("cogvideox-5b", 11, "sequential", True),
        ("cogvideox-5b", 3, "sequential", True),
        ("cogvideox1.5-5b", 139, "resident", False),
        ("cogvideox1.5-5b", 79, "resident", True),
        ("cogvideox1.5-5b", 47, "resident", True),
        ("cogvideox1.5-5b", 31, "model", True),
        ("cogvideox1.5-5b", 24, "sequential", True),
    ],
)
def test_the_fastest_plan_that_fits_is_chosen(five_b, name, free, offload, tiling):
    plan = plan_memory(SPECS[name], Path("unused"), gpu(free))
    assert (plan.offload, plan.tiling) == (offload, tiling), str(plan)


def test_a_forced_plan_is_taken_and_an_unknown_one_refused(five_b):
    spec = SPECS["cogvideox-5b"]
    assert plan_memory(spec, Path("unused"), gpu(139), forced="sequential").offload == "sequential"
    tight = plan_memory(spec, Path("unused"), gpu(10), forced="resident")
    assert (tight.offload, tight.tiling) == ("resident", True)
    assert "tight" in str(tight)
    with pytest.raises(UserError, match="COGVIDEOX_OFFLOAD=fast is unknown; allowed are resident, model"):
        plan_memory(spec, Path("unused"), gpu(139), forced="fast")


def test_a_cpu_is_resident_and_refuses_offload():
    plan = plan_memory(SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v", CPU)
    assert (plan.offload, plan.slicing, plan.tiling) == ("resident", False, False)
    with pytest.raises(UserError, match="needs a GPU"):
        plan_memory(SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v", CPU, forced="model")


def test_component_sizes_are_what_the_loaded_parameters_take():
    sizes = component_bytes(WEIGHTS / "tiny-t2v", "float32")
    pipeline = load_pipeline(
        SPECS["tiny-t2v"],
        WEIGHTS / "tiny-t2v",
        CPU,
        plan_memory(SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v", CPU),
    )
    for name in ("transformer", "vae", "text_encoder"):
        loaded = sum(p.numel() * p.element_size() for p in getattr(pipeline, name).parameters())
        assert sizes[name] == pytest.approx(loaded, rel=0.02), name
        assert {p.dtype for p in getattr(pipeline, name).parameters()} == {torch.float32}


def test_schedulers_are_built_from_the_checkpoints_settings():
    plan = plan_memory(SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v", CPU)
    pipeline = load_pipeline(SPECS["tiny-t2v"], WEIGHTS / "tiny-t2v", CPU, plan)
    original = pipeline.scheduler
    assert build_scheduler("default", original) is original
    for name, kind in (("ddim", "CogVideoXDDIMScheduler"), ("dpm", "CogVideoXDPMScheduler")):
        scheduler = build_scheduler(name, original)
        assert type(scheduler).__name__ == kind
        assert scheduler.config.timestep_spacing == "trailing"
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.beta_end == original.config.beta_end
