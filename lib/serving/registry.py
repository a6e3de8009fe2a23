"""The registry of predictors: what the cog*.yaml files name, so that a new file appears by itself."""

import ast
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lib.errors import UserError
from lib.models import specs
from lib.serving.schema import openapi_schema
from lib.weights import manifest

Mode = Literal["predict", "train"]
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """One cog*.yaml: the predictor's file and class, and its training function, if any."""

    name: str
    file: Path
    predictor: Path
    class_name: str
    train: Path | None = None
    train_name: str = "train"
    environment: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the predictor's docstring up to its first colon or line end."""
        docstring = ast.get_docstring(ast.parse(self.predictor.read_text(encoding="utf-8"))) or self.name
        return docstring.splitlines()[0].partition(":")[0].rstrip(".")

    def openapi(self, mode: Mode | None = None) -> dict[str, Any]:
        """Return the OpenAPI document of a server in this mode, or of an image. Raises SignatureError.

        An image serves predictions and trainings, a server one of them. Pages that read the document show the
        form for trainings where it has both.
        """
        return openapi_schema(
            self.predictor if mode != "train" else None,
            name=self.class_name,
            train=self.train if mode != "predict" else None,
            train_name=self.train_name,
        )


def predictors(project: Path = PROJECT) -> dict[str, PredictorConfig]:
    """Return the predictors by name, in order: `predict_t2v.py` is `t2v`."""
    found = [read_config(file) for file in project.glob("cog*.yaml")]
    return {config.name: config for config in sorted(found, key=lambda config: config.name)}


def read_config(file: Path) -> PredictorConfig:
    """Read one cog*.yaml. Raises UserError when it names no predictor."""
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    target = document.get("run") or document.get("predict")
    if not target:
        raise UserError(f"{file.name} has no run: entry")
    predictor, class_name = _target(file, target)
    train, train_name = _target(file, document["train"]) if document.get("train") else (None, "train")
    pairs = (entry.partition("=") for entry in document.get("environment") or [])
    return PredictorConfig(
        name=predictor.stem.removeprefix("predict_"),
        file=file,
        predictor=predictor,
        class_name=class_name,
        train=train,
        train_name=train_name,
        environment={name: value for name, _, value in pairs},
    )


def find_predictor(name: str, project: Path = PROJECT) -> PredictorConfig:
    """Return the configuration called `name`. Raises UserError listing the names that exist."""
    known = predictors(project)
    if name not in known:
        raise UserError(f"there is no predictor {name!r}; there are: {', '.join(known)}")
    return known[name]


def local_environment(config: PredictorConfig) -> dict[str, str]:
    """Return the variables of the file's `environment:` that are not set here, with the embedded model.

    The model in the file is for images that are built; a local server without COGVIDEOX_MODEL runs the
    embedded one for the same task.
    """
    variables = dict(config.environment)
    if spec := specs.SPECS.get(variables.pop("COGVIDEOX_MODEL", "")):
        variables["COGVIDEOX_MODEL"] = specs.DEFAULT_MODELS[spec.task]
    return {name: value for name, value in variables.items() if not os.environ.get(name)}


def absolute_folders(variables: dict[str, str]) -> dict[str, str]:
    """Return absolute paths for the variables that name files: models, cache and COG_WEIGHTS.

    They are relative to the caller's working directory, and a server has another. A known model's name is
    not a path even where a folder has the same name.
    """
    found = {}
    if cache := variables.get("COGVIDEOX_CACHE"):
        found["COGVIDEOX_CACHE"] = str(Path(cache).expanduser().resolve())
    known = {*specs.SPECS, *manifest.read_manifest(manifest.MANIFEST)}
    for name in ("COGVIDEOX_MODEL", "COGVIDEOX_WRITER", "COGVIDEOX_PAINTER"):
        model = variables.get(name)
        if model and model not in known and (folder := Path(model).expanduser()).is_dir():
            found[name] = str(folder.resolve())
    lora = variables.get("COG_WEIGHTS")
    if lora and "://" not in lora and (path := Path(lora).expanduser()).exists():
        found["COG_WEIGHTS"] = str(path.resolve())
    return found


def _target(file: Path, target: str) -> tuple[Path, str]:
    path, _, name = target.partition(":")
    return (file.parent / path).resolve(), name
