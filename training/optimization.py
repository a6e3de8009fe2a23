"""Optimizers and learning rate schedules by name, built by torch, bitsandbytes, prodigyopt and diffusers."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lib.errors import UserError
from training.config import TrainingConfig
from training.plan import warmup_steps

PROGRESS = frozenset({"k", "d", "d_max", "d_numerator"})
"""What prodigy learns for all parameters together."""
BLOCKWISE = ("qmap", "absmax")
QUANTILES, BLOCK = 256, 256
"""How bitsandbytes keeps means in 8 bits: a table of values, and one scale for so many numbers."""


def build_optimizer(
    config: TrainingConfig, parameters: Iterable[torch.nn.Parameter], learning_rate: float
) -> Optimizer:
    """The optimizer of the configuration; libraries and device were checked at the door."""
    shared = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "prodigy":
        import prodigyopt

        return prodigyopt.Prodigy(
            parameters,
            **shared,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )
    if config.optimizer.endswith("_8bit"):
        import bitsandbytes

        kind = (
            bitsandbytes.optim.Adam8bit if config.optimizer == "adam_8bit" else bitsandbytes.optim.AdamW8bit
        )
        return kind(parameters, **shared)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, **shared, fused=True)


def build_schedule(config: TrainingConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The learning rate over `steps` optimizer steps."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps(config, steps),
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def load_states(
    optimizer: Optimizer, schedule: LRScheduler, scaler: torch.amp.GradScaler | None, states: dict[str, Any]
) -> None:
    """Go on from saved states under the settings of this run, which optimizer and schedule were built with.

    What was learnt about the gradients is taken over, the learning rate and the other numbers are not: a run
    that has diverged goes on with a lower rate. Raises UserError for states of another shape; a stranger's
    would otherwise be read and written beyond their ends.
    """
    own = {key: value for key, value in optimizer.param_groups[0].items() if key not in PROGRESS}
    rates = schedule.base_lrs
    try:
        optimizer.load_state_dict(_sound(optimizer, states["optimizer"]))
        optimizer.param_groups[0].update(own)
        _continue_schedule(schedule, states["schedule"], rates)
        if scaler is not None and states["scaler"]:
            scaler.load_state_dict(states["scaler"])
        torch.set_rng_state(states["random"])
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise UserError(f"the training state does not fit this run: {error}.") from error


def _sound(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state with every tensor as long as its parameter's needs to be, and laid out plainly."""
    parameters = optimizer.param_groups[0]["params"]
    (group,) = saved["param_groups"]
    if len(group["params"]) != len(parameters) or not set(saved["state"]) <= set(range(len(parameters))):
        raise ValueError("it is of another number of matrices")
    if not all(math.isfinite(group[key]) for key in PROGRESS & group.keys()):
        raise ValueError("it holds numbers that are none")
    state = {
        index: {key: _sound_value(key, value, parameters[index]) for key, value in values.items()}
        for index, values in saved["state"].items()
    }
    return {"state": state, "param_groups": [group]}


def _sound_value(key: str, value: Any, parameter: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (int, float)) and math.isfinite(value):
            return value
        raise ValueError(f"{key} is {type(value).__name__}")
    count = parameter.numel()
    lengths = {1, count} | ({QUANTILES, -(-count // BLOCK)} if key.startswith(BLOCKWISE) else set())
    if value.shape != parameter.shape and (value.ndim > 1 or value.numel() not in lengths):
        raise ValueError(f"{key} is of shape {list(value.shape)} for a matrix of {list(parameter.shape)}")
    return value.contiguous()


def _continue_schedule(schedule: LRScheduler, saved: dict[str, Any], rates: list[float]) -> None:
    done = saved["last_epoch"]
    if type(done) is not int or done < 0:
        raise ValueError(f"the schedule is at step {done!r}")
    schedule.last_epoch, schedule._step_count, schedule.base_lrs = done, done + 1, rates
    for group, rate, factor in zip(schedule.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * factor(done)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
