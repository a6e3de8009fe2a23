"""A resumed run continues from the states of optimizer and schedule, with its own learning rate."""

import copy

import pytest
import torch

from lib.errors import UserError
from tests.training_factory import config
from training.optimization import build_optimizer, build_schedule, load_states

STEPS = 40


def a_run(**settings):
    settings = config(optimizer="adamw", lr_warmup_steps=4, **settings).optimizer
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(settings, [weights], global_batch=4)
    return weights, optimizer, build_schedule(settings, optimizer, STEPS)


def take_steps(weights, optimizer, schedule, count):
    """The learning rate of each step."""
    rates = []
    for _ in range(count):
        rates += schedule.get_last_lr()
        weights.grad = weights.detach().clone()
        optimizer.step()
        schedule.step()
    return rates


def resumed_from(run, **settings):
    """A new run with the states of `run`."""
    weights, optimizer, schedule = a_run(**settings)
    with torch.no_grad():
        weights.copy_(run[0])
    load_states(optimizer, schedule, None, states_of(run))
    return weights, optimizer, schedule


def states_of(run):
    return {
        "optimizer": copy.deepcopy(run[1].state_dict()),
        "schedule": run[2].state_dict(),
        "scaler": {},
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize(
    "lr_scheduler", ["constant", "cosine", "cosine_with_restarts", "polynomial", "linear"]
)
def test_a_resumed_run_takes_the_same_steps_as_an_unbroken_one(lr_scheduler):
    run, unbroken = a_run(lr_scheduler=lr_scheduler), a_run(lr_scheduler=lr_scheduler)
    take_steps(*run, 7)
    resumed = resumed_from(run, lr_scheduler=lr_scheduler)
    assert take_steps(*resumed, 9) == take_steps(*unbroken, 16)[7:]
    assert torch.equal(resumed[0], unbroken[0])


def test_a_resumed_run_uses_its_own_learning_rate():
    run = a_run(lr_scheduler="cosine", learning_rate=1e-3)
    take_steps(*run, 7)
    resumed = resumed_from(run, lr_scheduler="cosine", learning_rate=1e-4)
    rates = take_steps(*resumed, 3)
    expected = take_steps(*a_run(lr_scheduler="cosine", learning_rate=1e-4), 10)[7:]
    assert rates == expected
    assert resumed[1].state[resumed[0]]["step"] == 10  # the running means were kept


def test_a_resumed_run_uses_its_own_optimizer_settings():
    run = a_run(adam_weight_decay=0.5)
    take_steps(*run, 2)
    resumed = resumed_from(run, adam_weight_decay=0.25, adam_beta1=0.5)
    assert resumed[1].param_groups[0]["weight_decay"] == 0.25
    assert resumed[1].param_groups[0]["betas"] == (0.5, 0.95)


def test_a_resumed_prodigy_keeps_its_step_size():
    settings = {"optimizer": "prodigy", "learning_rate": 1.0}
    run, unbroken = a_prodigy_run(**settings), a_prodigy_run(**settings)
    take_steps(*run, 6)
    resumed = a_prodigy_run(**settings)
    with torch.no_grad():
        resumed[0].copy_(run[0])
    load_states(resumed[1], resumed[2], None, states_of(run))
    take_steps(*resumed, 5)
    take_steps(*unbroken, 11)
    assert unbroken[1].param_groups[0]["d"] > 1e-6
    assert torch.equal(resumed[0], unbroken[0])


def a_prodigy_run(**settings):
    settings = config(**settings).optimizer
    weights = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = build_optimizer(settings, [weights], global_batch=1)
    return weights, optimizer, build_schedule(settings, optimizer, STEPS)


def test_scale_lr_multiplies_the_learning_rate_by_the_global_batch():
    for scale_lr, expected in ((False, 1e-4), (True, 8e-4)):
        settings = config(scale_lr=scale_lr).optimizer
        optimizer = build_optimizer(settings, [torch.nn.Parameter(torch.ones(1))], global_batch=8)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def in_state(key, value):
    return lambda states: states["optimizer"]["state"][0].update({key: value})


@pytest.mark.parametrize(
    "spoil",
    [
        in_state("exp_avg", torch.zeros(1000)),
        in_state("exp_avg", torch.zeros(2)),
        in_state("exp_avg", torch.zeros(1).expand(7)),
        in_state("exp_avg_sq", "text"),
        in_state("step", float("nan")),
        lambda states: states["optimizer"].update(param_groups=[]),
        lambda states: states["optimizer"]["state"].update({5: {}}),
        lambda states: states["optimizer"]["param_groups"][0].update(params=[0, 1]),
        lambda states: states.update(optimizer={}),
        lambda states: states.update(schedule=[1]),
        lambda states: states.update(schedule={"last_epoch": -3}),
        lambda states: states.update(random="x"),
        lambda states: states.update(random=torch.zeros(3, dtype=torch.uint8)),
    ],
)
def test_states_that_do_not_fit_are_refused_before_they_are_used(spoil):
    run = a_run()
    take_steps(*run, 2)
    states = states_of(run)
    spoil(states)
    _, optimizer, schedule = a_run()
    with pytest.raises(UserError, match="the training state does not fit this run"):
        load_states(optimizer, schedule, None, states)
