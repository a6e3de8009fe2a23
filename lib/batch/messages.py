"""What the process that deals out a list and those that make its clips tell each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """The first message."""

    task: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """The answer: what it makes clips with."""

    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """The other answer: why no process can make any."""

    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Make:
    """One clip, to a file."""

    number: int
    inputs: dict[str, Any]
    output: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What became of a clip: its metrics, or why there is none."""

    number: int
    metrics: dict[str, Any]
    error: str = ""
