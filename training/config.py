"""A run's configuration: inputs by their flat names, checked and sorted into the groups of settings."""

import dataclasses
import functools
import hashlib
import json
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from lib.errors import UserError, shown
from lib.text_limits import check_length
from training.groups import (
    AdapterConfig,
    CheckpointsConfig,
    ComputeConfig,
    DataConfig,
    OptimizerConfig,
    PublishingConfig,
    RegularizationConfig,
    Role,
    ValidationConfig,
    parts,
    require,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One field of a config group, as read from its annotation and metadata."""

    name: str
    type: type
    """str, int, float, bool or tuple (of texts)."""
    optional: bool
    default: Any
    choices: tuple[str, ...] | None
    ge: float | None
    le: float | None
    max_length: int
    """Of a text, in characters."""
    role: Role


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """All settings of a run as given. None means that the base or the machine decides (training/plan.py)."""

    data: DataConfig
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    regularization: RegularizationConfig = dataclasses.field(default_factory=RegularizationConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    checkpoints: CheckpointsConfig = dataclasses.field(default_factory=CheckpointsConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    publishing: PublishingConfig = dataclasses.field(default_factory=PublishingConfig)

    @classmethod
    def from_inputs(cls, **inputs: Any) -> Self:
        """Check inputs, given by their flat names, and sort them into the groups.

        Raises UserError naming the setting, what was given and what is allowed, TypeError for an unknown
        name.
        """
        values: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        unknown = inputs.keys() - {each.name for _, each in all_settings()}
        if unknown:
            raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}")
        for group, each in all_settings():
            if each.name in inputs:
                values[group][each.name] = _checked(each, inputs[each.name])
        return cls(**{group: kind(**values[group]) for group, kind in GROUPS.items()})

    def public(self) -> dict[str, Any]:
        """Return every setting but secrets and this machine's paths, for records and model cards."""
        return {
            each.name: getattr(getattr(self, group), each.name)
            for group, each in all_settings()
            if each.role == "value"
        }

    def fixed(self) -> dict[str, Any]:
        """Return what a checkpoint and the run that continues it must have in common."""
        return {
            "rank": self.adapter.rank,
            "lora_alpha": self.adapter.alpha,
            "target_modules": ",".join(sorted(self.adapter.targets)),
            "optimizer": self.optimizer.optimizer,
        }

    @property
    def prior_prompts(self) -> list[str]:
        """prior_prompts as a list; without any, the empty prompt."""
        separator = self.validation.validation_prompt_separator
        return parts(self.regularization.prior_prompts, separator) or [""]


GROUPS: dict[str, type] = get_type_hints(TrainingConfig)


def all_settings() -> list[tuple[str, Setting]]:
    """Return the settings of all groups in order, each with its group's name."""
    return [(group, each) for group, kind in GROUPS.items() for each in settings_of(kind)]


def digest(content: Mapping[str, Any] | list[Any]) -> str:
    """Return a short stable name for anything that JSON can hold."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def settings_of(group: type) -> tuple[Setting, ...]:
    """Return the settings of a config group in order."""
    hints = get_type_hints(group)
    found = []
    for field in dataclasses.fields(group):
        kind: Any = hints[field.name]
        optional = get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)
        if optional:
            kind = next(part for part in get_args(kind) if part is not type(None))
        choices = get_args(kind) if get_origin(kind) is Literal else None
        kind = str if choices else get_origin(kind) or kind
        found.append(
            Setting(
                name=field.name,
                type=kind,
                optional=optional,
                default=field.default,
                choices=choices,
                **field.metadata,
            )
        )
    return tuple(found)


def _checked(each: Setting, value: Any) -> Any:
    """Return the value in the setting's type: JSON and Cog pass 9.0 for 9 and 1 for 1.0.

    Raises UserError naming the setting, what was given and what is allowed.
    """
    name = each.name
    if each.role == "secret":
        value = value.get_secret_value() if hasattr(value, "get_secret_value") else value or ""
    if each.role == "file" and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None and each.optional:
        return None
    if each.type is tuple:
        require(value is None or isinstance(value, (list, tuple)), f"{name}={shown(value)} is not a list.")
        return tuple(str(item) for item in value or ())
    if each.type in (int, float):
        return _checked_number(each, value)
    expected = "true or false" if each.type is bool else "text"
    require(isinstance(value, each.type), f"{name}={shown(value)} is not {expected}.")
    if isinstance(value, str) and each.role != "file":
        check_length(name, value, each.max_length)
    if each.choices and value not in each.choices:
        raise UserError(f"{name}={shown(value)} is not one of {', '.join(each.choices)}.")
    return value


def _checked_number(each: Setting, value: Any) -> int | float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_integral = is_number and (isinstance(value, int) or value.is_integer())
    expected = "a whole number" if each.type is int else "a number"
    require(is_integral if each.type is int else is_number, f"{each.name}={shown(value)} is not {expected}.")
    low, high = each.ge, each.le
    if low is not None and high is not None and not low <= value <= high:  # NaN is outside as well
        nearest = high if value > high else low
        raise UserError(f"{each.name}={value} is out of range: use {low} to {high} (nearest: {nearest}).")
    return each.type(value)
