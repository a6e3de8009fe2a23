"""Checkpoints of a run: written whole or not at all, the newest few kept, and found again."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lib.errors import UserError
from lib.storage.disk import disk_error
from training.config import TrainingConfig

LORA = "lora.safetensors"
TENSORS = "training.pt"
STATE = "state.json"
CAPTIONS = "autocaptions.jsonl"
"""Only of runs with autocaption, here and in results: what a run that goes on need not caption again."""
TENSOR_KEYS = frozenset({"optimizer", "schedule", "scaler", "random"})


@dataclass(kw_only=True, slots=True)
class State:
    """What a checkpoint says besides its tensors."""

    step: int
    """Optimizer steps done."""
    seed: int
    base: str
    fits: dict[str, Any]
    """What a run that continues it must share (TrainingConfig.fits)."""
    data: str
    """Digest of the samples: with the same ones, a resumed run repeats an uninterrupted one's losses."""
    global_batch: int
    losses: list[float] = field(default_factory=list)
    """Of every step so far."""


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save(target: Path, state: State, tensors: dict[str, Any], write_lora: Any, *, captions: str = "") -> Path:
    """Write a checkpoint to `target`, which appears only when all of it is on the disk.

    `write_lora` writes the LoRA to the path that it is given; `captions` is the content of CAPTIONS. Raises
    UserError when the disk is full.
    """
    if is_checkpoint(target):  # a stop right after a checkpoint asks for the same one once more
        return target
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_lora(partial / LORA)
        torch.save(tensors, partial / TENSORS)
        (partial / STATE).write_text(json.dumps(asdict(state)))
        if captions:
            (partial / CAPTIONS).write_text(captions, encoding="utf-8")
        for path in partial.iterdir():
            _flush(path)
        os.replace(partial, target)
        _flush(target.parent)
    except OSError as error:
        raise disk_error(error, target) from error
    except RuntimeError as error:  # how torch.save reports a full disk
        raise UserError(f"{target} could not be written: {error}. Is the disk full?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def keep_newest(run: Path, count: int) -> None:
    """Remove all but the newest checkpoints of a run."""
    for folder in everyone(run)[:-count]:
        remove(folder)


def remove(folder: Path) -> None:
    """Under another name first: a kill in the middle must not leave half a checkpoint under its own."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.old.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def everyone(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".partial")


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return next(reversed(everyone(run)), None)


def read_state(folder: Path) -> State:
    """Raises UserError when the folder is no checkpoint."""
    try:
        state = State(**json.loads((folder / STATE).read_text()))
        _check_state(state)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder.name} is not a checkpoint of this trainer: {error}.") from error
    return state


def read_tensors(folder: Path) -> dict[str, Any]:
    """Optimizer, schedule and random state. Raises UserError when the file is damaged or holds code."""
    try:
        tensors = torch.load(folder / TENSORS, map_location="cpu", weights_only=True)
        missing = TENSOR_KEYS - set(tensors if isinstance(tensors, dict) else ())
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except Exception as error:  # in a damaged file the unpickler stumbles in any way
        raise UserError(f"{TENSORS} of the checkpoint cannot be read: {error}.") from error
    return tensors


def is_checkpoint(folder: Path) -> bool:
    return (folder / STATE).is_file()


def continued(config: TrainingConfig, state: State) -> TrainingConfig:
    """The configuration with the state's seed where none is given.

    Raises UserError unless a run under these settings can go on from the state.
    """
    differing = [
        f"{name} (it has {state.fits.get(name)}, this run {value})"
        for name, value in config.fits().items()
        if state.fits.get(name) != value
    ]
    if differing:
        raise UserError(
            f"the checkpoint of step {state.step} does not fit: {', '.join(differing)}. Give what it was "
            "made with, or another output_dir to begin anew."
        )
    return config if config.seed is not None else replace(config, seed=state.seed)


def check_unfinished(state: State, *, base: str, steps: float, has_result: bool = True) -> None:
    """Raise UserError unless the state is of this base and has steps left, or at least no result."""
    if state.base != base:
        raise UserError(
            f"the checkpoint was trained on {state.base} and this run's base is {base}: set COGVIDEOX_MODEL "
            "to the same, or begin anew in another output_dir."
        )
    if state.step >= steps + (not has_result):
        raise UserError(
            f"the checkpoint has {state.step} steps already and this run ends at {steps}: give a larger "
            "max_train_steps, which counts them all, or another output_dir to begin anew."
        )


@contextlib.contextmanager
def telling_what_is_kept(run: Path) -> Iterator[None]:
    """Adds to the errors of a run which checkpoint is left to go on from."""
    try:
        yield
    except UserError as error:
        newest = latest(run)
        if newest is None:
            raise
        step = int(newest.name.removeprefix("step-"))
        kept = f"The checkpoint of step {step} is kept; {LORA} in it can be used."
        raise type(error)(f"{error} {kept}") from error


def _check_state(state: State) -> None:
    """A stranger's file may hold anything; what is wrong must not come out hours later."""
    for name in ("step", "seed", "global_batch"):
        value = getattr(state, name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}")
    for name, kind in (("base", str), ("data", str), ("fits", dict), ("losses", list)):
        if not isinstance(getattr(state, name), kind):
            raise ValueError(f"{name} is {getattr(state, name)!r}")
    sound = all(type(loss) is float and math.isfinite(loss) for loss in state.losses)
    if not sound or len(state.losses) != state.step:
        raise ValueError(f"losses are not {state.step} numbers")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
