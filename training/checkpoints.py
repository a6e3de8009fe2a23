"""Checkpoints of a run: written in one step, read and checked, the newest few kept."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lib.errors import UserError
from lib.storage.disk import replacing
from training.config import TrainingConfig

LORA = "lora.safetensors"
TENSORS = "training.pt"
STATE = "state.json"
CAPTIONS = "autocaptions.jsonl"
"""The captions made by autocaption, also in results, so that a resumed run does not make them again."""
TENSOR_KEYS = frozenset({"optimizer", "schedule", "scaler", "random"})


@dataclass(kw_only=True, slots=True)
class State:
    """A checkpoint's content except its tensors. The names of its fields are those of state.json."""

    step: int
    """Optimizer steps done."""
    seed: int
    base: str
    fits: dict[str, Any]
    """Settings by input name (TrainingConfig.fixed) that a resumed run must have too."""
    data: str
    """Digest of the samples; if it is the same, a resumed run has the losses of an uninterrupted one."""
    global_batch: int
    losses: list[float] = field(default_factory=list)
    """Losses of all steps so far."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint at a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def save(
    target: Path, state: State, tensors: dict[str, Any], write_lora: Callable[[Path], None], *,
    captions: str = "",
) -> Path:  # fmt: skip
    """Write a checkpoint to `target`, which appears only when all of it is on the disk.

    `write_lora` writes the LoRA to a path; `captions` is the content of CAPTIONS. Raises UserError when the
    disk is full.
    """
    if is_checkpoint(target):  # the run was stopped right after it
        return target
    try:
        with replacing(target) as partial:
            partial.mkdir(parents=True)
            write_lora(partial / LORA)
            torch.save(tensors, partial / TENSORS)
            (partial / STATE).write_text(json.dumps(asdict(state)))
            if captions:
                (partial / CAPTIONS).write_text(captions, encoding="utf-8")
            for path in partial.iterdir():
                _flush(path)
    except RuntimeError as error:  # how torch.save reports a full disk
        raise UserError(f"{target} could not be written: {error}. Is the disk full?") from error
    _flush(target.parent)
    return target


def keep_newest(run: Path, count: int) -> None:
    """Remove all but the newest checkpoints of a run."""
    for folder in all_checkpoints(run)[:-count]:
        # Renamed first: a kill in the middle must not leave half a checkpoint under this name.
        renamed = folder.with_name(f"{folder.name}.old.partial")
        shutil.rmtree(renamed, ignore_errors=True)
        os.replace(folder, renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def all_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".partial")


def latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run."""
    return next(reversed(all_checkpoints(run)), None)


def read_state(folder: Path) -> State:
    """Read and check state.json. Raises UserError when the folder is not a checkpoint."""
    try:
        state = State(**json.loads((folder / STATE).read_text()))
        _check_state(state)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder.name} is not a checkpoint of this trainer: {error}.") from error
    return state


def read_tensors(folder: Path) -> dict[str, Any]:
    """Read optimizer, schedule and random state. Raises UserError if it is damaged or contains code."""
    try:
        tensors = torch.load(folder / TENSORS, map_location="cpu", weights_only=True)
        missing = TENSOR_KEYS - set(tensors if isinstance(tensors, dict) else ())
        if missing:
            raise ValueError(f"missing: {', '.join(sorted(missing))}")
    except Exception as error:  # the unpickler raises anything on a damaged file
        raise UserError(f"{TENSORS} of the checkpoint cannot be read: {error}.") from error
    return tensors


def is_checkpoint(folder: Path) -> bool:
    """Return whether the folder has a training state, not just a LoRA."""
    return (folder / STATE).is_file()


def with_seed_of(config: TrainingConfig, state: State) -> TrainingConfig:
    """Return the configuration with the state's seed where none is given.

    Raises UserError unless a run under these settings can resume from the state.
    """
    differing = [
        f"{name} (it has {state.fits.get(name)}, this run {value})"
        for name, value in config.fixed().items()
        if state.fits.get(name) != value
    ]
    if differing:
        raise UserError(
            f"the checkpoint of step {state.step} does not fit: {', '.join(differing)}. Use the settings "
            "it was made with, or another output_dir to start from scratch."
        )
    if config.compute.seed is not None:
        return config
    return replace(config, compute=replace(config.compute, seed=state.seed))


@contextlib.contextmanager
def name_kept_checkpoint(run: Path) -> Iterator[None]:
    """Add to a run's errors which checkpoint it can resume from."""
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
    """Check types and values now: the file may come from an untrusted caller, and training takes hours."""
    for name in ("step", "seed", "global_batch"):
        value = getattr(state, name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}")
    for name, kind in (("base", str), ("data", str), ("fits", dict), ("losses", list)):
        if not isinstance(getattr(state, name), kind):
            raise ValueError(f"{name} is {getattr(state, name)!r}")
    finite = all(type(loss) is float and math.isfinite(loss) for loss in state.losses)
    if not finite or len(state.losses) != state.step:
        raise ValueError(f"losses are not {state.step} numbers")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
