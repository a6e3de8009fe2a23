"""What every predictor settles first: which model, from where, what to call it; and what it reports to."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lib.models import derive, specs
from lib.models.specs import ModelSpec, Task
from lib.network import offline
from lib.predictors import input_files
from lib.weights import checkpoints


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
    input_files.install()
    return model_called(os.environ.get("COGVIDEOX_MODEL") or specs.DEFAULT_MODELS[task], task)


def model_called(name: str, task: Task) -> Model:
    """As settle_model, by name and in any process."""
    if name in specs.SPECS:
        specs.check_task(name, specs.SPECS[name].task, task)
    folder = checkpoints.locate(
        name, check=lambda index: specs.check_task(name, derive.task_of(index, name), task)
    )
    spec = derive.spec_for(name, folder)
    offline.go_offline()
    return Model(
        spec=spec,
        folder=folder,
        label=spec.name if Path(name).is_dir() else name,
        embedded=name == specs.DEFAULT_MODELS[task],
    )
