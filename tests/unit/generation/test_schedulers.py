from pathlib import Path

from diffusers import CogVideoXDDIMScheduler

from lib.generation.schedulers import build_scheduler

FOLDER = Path(__file__).resolve().parents[3] / "weights" / "tiny-t2v" / "scheduler"


def test_schedulers_are_built_from_the_checkpoints_settings():
    original = CogVideoXDDIMScheduler.from_pretrained(FOLDER)
    assert build_scheduler("default", original) is original
    for name, kind in (("ddim", "CogVideoXDDIMScheduler"), ("dpm", "CogVideoXDPMScheduler")):
        scheduler = build_scheduler(name, original)
        assert type(scheduler).__name__ == kind
        assert scheduler.config.timestep_spacing == "trailing"
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.beta_end == original.config.beta_end
