"""What every predictor settles first: which model, from where, what to call it; and what it reports to."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lib import derived, models, offline, weights
from lib.compute import limit_spinning
from lib.models import ModelSpec, Task
from lib.serving import guard


class MetricSink(Protocol):
    """The part of Cog's BaseRunner that a service reports to."""

    def record_metric(self, name: str, value: object) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model on this disk."""

    spec: ModelSpec
    folder: Path
    label: str
    """Its name, with no path of this machine in it: others see it."""
    embedded: bool

    @property
    def title(self) -> str:
        """For the line that a server prints when it is ready."""
        return f"{self.label} (embedded; COGVIDEOX_MODEL chooses another)" if self.embedded else self.label


def settle_model(task: Task) -> Model:
    """The model that COGVIDEOX_MODEL names (empty: the embedded one), downloaded if need be.

    To be called before torch is imported; afterwards the libraries are offline. Raises UserError for a model
    that is none, cannot be had, or does another task.
    """
    limit_spinning()
    guard.install()
    return model_called(os.environ.get("COGVIDEOX_MODEL") or models.DEFAULT_MODELS[task], task)


def model_called(name: str, task: Task) -> Model:
    """As settle_model, by name and in any process."""
    if name in models.SPECS:
        models.check_task(name, models.SPECS[name].task, task)
    folder = weights.locate(
        name, check=lambda index: models.check_task(name, derived.task_of(index, name), task)
    )
    spec = derived.spec_for(name, folder)
    offline.go_offline()
    return Model(
        spec=spec,
        folder=folder,
        label=spec.name if Path(name).is_dir() else name,
        embedded=name == models.DEFAULT_MODELS[task],
    )
