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

EMBEDDED_WRITER, EMBEDDED_PAINTER = "tiny-writer", "tiny-painter"
RELEASED_WRITER, RELEASED_PAINTER = "qwen3-4b-instruct", "flux.2-klein-4b"
"""Names in weights/manifest.toml."""


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


def locate_helpers() -> tuple[tuple[str, Path], tuple[str, Path]]:
    """Return the label and folder of the writer and the painter, downloading them if needed.

    They are those of COGVIDEOX_WRITER and COGVIDEOX_PAINTER; by default the embedded ones next to an embedded
    video model, the released ones next to others. Raises UserError as resolve_model does.
    """
    variables = settings.current()
    is_embedded = variables.model in ("", *specs.DEFAULT_MODELS.values())
    names = (
        variables.writer or (EMBEDDED_WRITER if is_embedded else RELEASED_WRITER),
        variables.painter or (EMBEDDED_PAINTER if is_embedded else RELEASED_PAINTER),
    )
    folders = [checkpoints.locate(name) for name in names]
    labels = [Path(name).name if Path(name).is_dir() else name for name in names]
    return (labels[0], folders[0]), (labels[1], folders[1])


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
