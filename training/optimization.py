"""Optimizers and learning rate schedules by name, built by torch, bitsandbytes, prodigyopt and diffusers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from training.config import TrainingConfig
from training.plan import warmup_steps


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


def load_states(optimizer: Optimizer, schedule: LRScheduler, states: dict[str, Any]) -> None:
    """Go on from saved states, at the learning rate of this run: both were just built with it.

    A run that has diverged goes on with a lower rate, which the saved states would undo.
    """
    rates = schedule.base_lrs
    optimizer.load_state_dict(states["optimizer"])
    schedule.load_state_dict(states["schedule"])
    schedule.base_lrs = rates
    for group, rate, factor in zip(optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
