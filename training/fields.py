"""Settings as dataclass fields: their types and bounds, read from the fields and checked against values."""

import dataclasses
import functools
import os
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lib.errors import UserError

Role = Literal["value", "file", "path", "secret"]
"""A file is uploaded with a request; a path may name a place on this machine. Only values are recorded."""


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
    role: Role


def setting(default: Any, *, ge: float | None = None, le: float | None = None, role: Role = "value") -> Any:
    """Declare a field with its bounds; choices are those of its Literal type."""
    return dataclasses.field(default=default, metadata={"ge": ge, "le": le, "role": role})


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


def require(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def checked(each: Setting, value: Any) -> Any:
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
        require(value is None or isinstance(value, (list, tuple)), f"{name}={value!r} is not a list.")
        return tuple(str(item) for item in value or ())
    if each.type in (int, float):
        return _checked_number(each, value)
    expected = "true or false" if each.type is bool else "text"
    require(isinstance(value, each.type), f"{name}={value!r} is not {expected}.")
    if each.choices and value not in each.choices:
        raise UserError(f"{name}={value!r} is not one of {', '.join(each.choices)}.")
    return value


def _checked_number(each: Setting, value: Any) -> int | float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_whole = is_number and (isinstance(value, int) or value.is_integer())
    expected = "a whole number" if each.type is int else "a number"
    require(is_whole if each.type is int else is_number, f"{each.name}={value!r} is not {expected}.")
    low, high = each.ge, each.le
    if low is not None and high is not None and not low <= value <= high:  # NaN is outside as well
        nearest = high if value > high else low
        raise UserError(f"{each.name}={value} is out of range: use {low} to {high} (nearest: {nearest}).")
    return each.type(value)
