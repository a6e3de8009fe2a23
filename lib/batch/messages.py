"""Messages between the process that distributes a list and its batch workers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.models.specs import VideoTask


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPredictor:
    """The first message to a worker."""

    task: VideoTask


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictorReady:
    """The answer: the worker can take rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictorRefused:
    """The other answer: why no worker can load the predictor."""

    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MakeClip:
    """One row: make its clip and save it to a file."""

    number: int
    inputs: dict[str, Any]
    output: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipResult:
    """The result of a row: the clip's metrics, or why there is no clip."""

    number: int
    metrics: dict[str, Any]
    error: str = ""
