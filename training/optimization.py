"""The optimizer, the learning rate and its schedule, and how they resume from saved states."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lib.errors import UserError
from training.groups import OptimizerConfig

DEFAULT_STEPS = 1500
MAX_WARMUP_STEPS = 500
PROGRESS = frozenset({"k", "d", "d_max", "d_numerator"})
"""Prodigy's state that all parameters share."""
BLOCKWISE = ("qmap", "absmax")
QUANTILES, BLOCK = 256, 256
"""bitsandbytes' 8-bit means: a table of values, and one scale for each block of numbers."""


def total_steps(config: OptimizerConfig, samples: int, global_batch: int) -> int:
    """Return the run's number of optimizer steps; epochs are rounded up to complete steps."""
    if config.num_train_epochs is not None:
        return -(-samples * config.num_train_epochs // global_batch)
    return config.max_train_steps or DEFAULT_STEPS


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter], *, global_batch: int
) -> Optimizer:
    """Build the optimizer; its libraries and device are known to be there (training/plan.py)."""
    shared: dict[str, Any] = {
        "lr": config.learning_rate * (global_batch if config.scale_lr else 1),
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "prodigy":
        import prodigyopt  # an optional package

        return prodigyopt.Prodigy(
            parameters,
            **shared,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )
    if config.optimizer.endswith("_8bit"):
        import bitsandbytes  # an optional package

        kind = (
            bitsandbytes.optim.Adam8bit if config.optimizer == "adam_8bit" else bitsandbytes.optim.AdamW8bit
        )
        return kind(parameters, **shared)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, **shared, fused=True)


def build_schedule(config: OptimizerConfig, optimizer: Optimizer, steps: int) -> LambdaLR:
    """Build the schedule of the learning rate over `steps` optimizer steps."""
    warmup = config.lr_warmup_steps
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=min(MAX_WARMUP_STEPS, steps // 10) if warmup is None else warmup,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def load_states(
    optimizer: Optimizer, schedule: LambdaLR, scaler: torch.amp.GradScaler | None, states: dict[str, Any]
) -> None:
    """Load saved states into an optimizer and a schedule that were built with this run's settings.

    The gradients' statistics are taken over; the learning rate and other settings are not, so that a run
    that has diverged can resume with a lower rate. Raises UserError for states of another shape: those of an
    untrusted caller would otherwise be read and written out of bounds.
    """
    own = {key: value for key, value in optimizer.param_groups[0].items() if key not in PROGRESS}
    rates = schedule.base_lrs
    try:
        optimizer.load_state_dict(_checked_state(optimizer, states["optimizer"]))
        optimizer.param_groups[0].update(own)
        _resume_schedule(schedule, states["schedule"], rates)
        if scaler is not None and states["scaler"]:
            scaler.load_state_dict(states["scaler"])
        torch.set_rng_state(states["random"])
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise UserError(f"the training state does not fit this run: {error}.") from error


def _checked_state(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the saved state, contiguous; raises ValueError unless every tensor has its parameter's size."""
    parameters = optimizer.param_groups[0]["params"]
    (group,) = saved["param_groups"]
    if len(group["params"]) != len(parameters) or not set(saved["state"]) <= set(range(len(parameters))):
        raise ValueError("it has a different number of matrices")
    if not all(math.isfinite(group[key]) for key in PROGRESS & group.keys()):
        raise ValueError("it contains NaN or infinity")
    state = {
        index: {key: _checked_value(key, value, parameters[index]) for key, value in values.items()}
        for index, values in saved["state"].items()
    }
    return {"state": state, "param_groups": [group]}


def _checked_value(key: str, value: Any, parameter: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (int, float)) and math.isfinite(value):
            return value
        raise ValueError(f"{key} is {type(value).__name__}")
    count = parameter.numel()
    lengths = {1, count} | ({QUANTILES, -(-count // BLOCK)} if key.startswith(BLOCKWISE) else set())
    if value.shape != parameter.shape and (value.ndim > 1 or value.numel() not in lengths):
        raise ValueError(f"{key} is of shape {list(value.shape)} for a matrix of {list(parameter.shape)}")
    return value.contiguous()


def _resume_schedule(schedule: LambdaLR, saved: dict[str, Any], rates: list[float | torch.Tensor]) -> None:
    done = saved["last_epoch"]
    if type(done) is not int or done < 0:
        raise ValueError(f"the schedule is at step {done!r}")
    schedule.last_epoch, schedule._step_count, schedule.base_lrs = done, done + 1, rates
    for group, rate, factor in zip(schedule.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * factor(done)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
