"""Resolve the model of a predictor: its folder on this disk, its spec, and its name for users."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lib import settings
from lib.models import derive, specs
from lib.models.specs import ModelSpec, Task
from lib.network import offline
from lib.predictors import input_files
from lib.weights import checkpoints


class MetricSink(Protocol):
    """The part of Cog's BaseRunner that metrics go to."""

    def record_metric(self, name: str, value: object, /) -> None: ...


class Metrics(dict[str, object]):
    """Metrics of a request that does not come from Cog."""

    def record_metric(self, name: str, value: object) -> None:
        self[name] = value


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model on this disk."""

    spec: ModelSpec
    folder: Path
    label: str
    """Its name without any path of this machine, since others see it."""
    embedded: bool

    @property
    def title(self) -> str:
        """The model in the line that a server prints when it is ready."""
        return f"{self.label} (embedded; COGVIDEOX_MODEL chooses another)" if self.embedded else self.label


def resolve_model(task: Task) -> Model:
    """Return the model that COGVIDEOX_MODEL names (empty: the embedded one), downloading it if needed.

    Does not import torch. Afterwards the libraries are offline. Raises UserError for a variable with an
    invalid value, and for a model that is unknown, cannot be downloaded, or does another task.
    """
    input_files.install()
    name = settings.current().model or specs.DEFAULT_MODELS[task]
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
