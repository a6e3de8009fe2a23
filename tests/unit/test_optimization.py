"""A resumed run goes on from the states of optimizer and schedule, at the learning rate it is given."""

import pytest
import torch

from training.config import TrainingConfig
from training.optimization import build_optimizer, build_schedule, load_states

STEPS = 40


def a_run(**settings):
    config = TrainingConfig(input_videos="clips", optimizer="adamw", lr_warmup_steps=4, **settings)
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(config, [weights], config.learning_rate)
    return weights, optimizer, build_schedule(config, optimizer, STEPS)


def take_steps(weights, optimizer, schedule, count):
    """The learning rate of each step."""
    rates = []
    for _ in range(count):
        rates += schedule.get_last_lr()
        weights.grad = weights.detach().clone()
        optimizer.step()
        schedule.step()
    return rates


def going_on(run, **settings):
    """A new run with the states of `run`."""
    weights, optimizer, schedule = a_run(**settings)
    with torch.no_grad():
        weights.copy_(run[0])
    states = {"optimizer": run[1].state_dict(), "schedule": run[2].state_dict()}
    load_states(optimizer, schedule, states)
    return weights, optimizer, schedule


@pytest.mark.parametrize(
    "lr_scheduler", ["constant", "cosine", "cosine_with_restarts", "polynomial", "linear"]
)
def test_a_resumed_run_takes_the_same_steps_as_an_unbroken_one(lr_scheduler):
    run, unbroken = a_run(lr_scheduler=lr_scheduler), a_run(lr_scheduler=lr_scheduler)
    take_steps(*run, 7)
    resumed = going_on(run, lr_scheduler=lr_scheduler)
    assert take_steps(*resumed, 9) == take_steps(*unbroken, 16)[7:]
    assert torch.equal(resumed[0], unbroken[0])


def test_a_resumed_run_goes_on_at_the_learning_rate_that_it_is_given():
    run = a_run(lr_scheduler="cosine", learning_rate=1e-3)
    take_steps(*run, 7)
    resumed = going_on(run, lr_scheduler="cosine", learning_rate=1e-4)
    rates = take_steps(*resumed, 3)
    expected = take_steps(*a_run(lr_scheduler="cosine", learning_rate=1e-4), 10)[7:]
    assert rates == expected
    assert resumed[1].state[resumed[0]]["step"] == 10  # the running means were kept
