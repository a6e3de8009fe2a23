"""Messages between the worker pool and its workers."""

from dataclasses import dataclass
from pathlib import Path

from lib.distributed.layout import Layout
from lib.generation.prompts import Embeddings
from lib.generation.request import Request
from lib.lora.source import Choice
from lib.memory.plan import MemoryPlan
from lib.models.specs import ModelSpec
from lib.pipelines.acceleration import PLAIN, Acceleration
from lib.pipelines.machine import Machine


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSetup:
    """The first message to a worker: which model to load, and how; the first process does the same."""

    spec: ModelSpec
    folder: Path
    machine: Machine
    plan: MemoryPlan
    settings: Acceleration = PLAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLoaded:
    """The answer to ModelSetup."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinGroup:
    """Sent once all have loaded: the process group to join, through the file `store`."""

    rank: int
    count: int
    store: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoisingJob:
    """One clip to denoise together with the other processes."""

    request: Request
    loras: list[Choice]
    embeddings: Embeddings
    """Embeddings of prompt and negative prompt: only the first process has a text encoder."""
    layout: Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFailed:
    """The last message of a worker that cannot go on."""

    error: str
