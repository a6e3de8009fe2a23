"""A run resumes where steps or the result are missing, on the base that its checkpoint was trained on."""

import dataclasses
import json

import pytest
import torch

from lib.errors import UserError
from tests.training_factory import config
from training import checkpoints
from training.checkpoints import State
from training.resume import check_origin, check_unfinished


def state(step: int = 3) -> State:
    return State(
        step=step, seed=7, base="tiny-i2v", fits=config(rank=4).fixed(), data="d", global_batch=2,
        losses=[0.5] * step,
    )  # fmt: skip


@pytest.fixture
def origin(tmp_path):
    """A checkpoint of step 3 in a run without a result."""
    tensors = {"optimizer": {}, "schedule": {}, "scaler": {}, "random": torch.get_rng_state()}
    target = checkpoints.checkpoint_folder(tmp_path, 3)
    return checkpoints.save(target, state(), tensors, lambda path: path.write_bytes(b"x"))


def refusal(origin, *, base="tiny-i2v", steps=4) -> str:
    with pytest.raises(UserError) as caught:
        check_unfinished(state(), origin, base=base, steps=steps)
    return str(caught.value)


def test_a_checkpoint_of_another_base_is_refused(origin):
    check_unfinished(state(), origin, base="tiny-i2v", steps=4)
    assert refusal(origin, base="cogvideox-5b-i2v") == (
        "the checkpoint was trained on tiny-i2v and this run's base is cogvideox-5b-i2v: set COGVIDEOX_MODEL "
        "to the same, or start from scratch in another output_dir."
    )


def test_a_finished_run_is_refused_unless_its_result_is_missing(origin):
    check_unfinished(state(), origin, base="tiny-i2v", steps=3)
    result = origin.parent.parent / "result"
    result.mkdir()
    (result / "loss.csv").write_text("step,loss\n1,0.5\n2,0.5\n3,0.5\n")
    for steps in (3, 2):
        assert refusal(origin, steps=steps) == (
            f"the checkpoint has 3 steps already and this run ends at {steps}: give a larger "
            "max_train_steps, which counts them all, or another output_dir to start from scratch."
        )


def test_a_run_takes_the_seed_of_its_checkpoint_and_keeps_its_other_settings(origin):
    given = config(rank=4, learning_rate=1e-3, max_train_steps=9)
    resumed = check_origin(given, origin, base="tiny-i2v")
    assert resumed.compute.seed == 7
    assert dataclasses.replace(resumed, compute=given.compute) == given


def test_the_state_of_earlier_versions_with_flat_settings_is_read(origin):
    """Written by the trainer when its settings were one flat class."""
    written = {
        "step": 2, "seed": 5, "base": "tiny-i2v",
        "fits": {
            "rank": 4, "lora_alpha": 4.0, "target_modules": "to_k,to_out.0,to_q,to_v", "optimizer": "adam"
        },
        "data": "0123456789abcdef", "global_batch": 1, "losses": [0.5, 0.25],
    }  # fmt: skip
    (origin / checkpoints.STATE).write_text(json.dumps(written))
    assert check_origin(config(rank=4), origin, base="tiny-i2v").compute.seed == 5
    with pytest.raises(UserError, match=r"does not fit: rank \(it has 4, this run 8\)"):
        check_origin(config(rank=8, lora_alpha=4), origin, base="tiny-i2v")


def test_with_epochs_the_steps_left_are_checked_once_the_samples_are_known(origin):
    check_origin(config(rank=4, num_train_epochs=1), origin, base="tiny-i2v")
    with pytest.raises(UserError, match="this run's base is tiny-t2v"):
        check_origin(config(rank=4, num_train_epochs=1), origin, base="tiny-t2v")
