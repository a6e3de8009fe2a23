"""Find what a run resumes from: its own newest checkpoint, or the earlier output in resume_from."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from lib.errors import UserError, shown
from lib.network.http import Source, save, without_secrets
from lib.network.urls import check_address, request_rules
from lib.progress import Report
from lib.settings import current
from lib.storage.archive import extract_tar
from training import checkpoints
from training.adapter import check_adapter
from training.checkpoints import State
from training.config import TrainingConfig
from training.devices import from_main
from training.optimization import total_steps
from training.result import RESULT, TRAINING_STATE, steps_of_result

MAX_OUTPUT_BYTES = 50 * 10**9


@contextlib.contextmanager
def found_origin(
    resume_from: str, run: Path, accelerator: Accelerator, *, stop: threading.Event, report: Report
) -> Iterator[Path | None]:
    """Yield the folder to resume from, None to start from scratch; what is unpacked is removed afterwards.

    The run's own checkpoints take precedence over `resume_from`. One process fetches for all.
    """
    work = run / "origin"

    def find() -> Path | None:
        newest = checkpoints.latest(run)
        if newest is not None or not resume_from:
            return newest
        shutil.rmtree(work, ignore_errors=True)  # left by a killed process
        return open_origin(resume_from, work, stop=stop, report=report)

    try:
        yield from_main(accelerator, find)
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(work, ignore_errors=True)


def open_origin(given: str, folder: Path, *, stop: threading.Event, report: Report) -> Path:
    """Return the folder that resume_from names: a checkpoint, or at least lora.safetensors.

    `given` is the URL of an output, or, where local sources are allowed, a tar, a folder of results, of a run
    or of a checkpoint. Raises UserError for anything else.
    """
    if "://" in given:
        check_address(given)
        archive = folder / "output.tar"
        report("resume_from: downloading the earlier output")
        rules = request_rules(stop=stop)
        save(Source(url=given, max_bytes=MAX_OUTPUT_BYTES, rules=rules), archive)
        place = extract_tar(archive, folder / "content", max_bytes=MAX_OUTPUT_BYTES)
        archive.unlink()
    elif not current().local_sources:
        raise UserError(
            f"resume_from={shown(given)} is a path on the server; give the https:// address of the tar."
        )
    else:
        place = Path(os.path.expanduser(given))  # which leaves an unknown ~user as it is
        if not place.exists():
            raise UserError(f"resume_from={given} does not exist; give an earlier output or a checkpoint.")
        if place.name == checkpoints.LORA:
            place = place.parent
        elif place.is_file():
            place = extract_tar(place, folder / "content", max_bytes=MAX_OUTPUT_BYTES)
    for found in (place, place / TRAINING_STATE, checkpoints.latest(place)):
        if found is not None and checkpoints.is_checkpoint(found):
            return found
    for found in (place, place / "output", place / RESULT):
        if (found / checkpoints.LORA).is_file():
            return found
    raise UserError(
        f"resume_from={without_secrets(given)} has neither a training state nor {checkpoints.LORA}; give the "
        "output of this trainer, made with save_training_state to resume exactly."
    )


def check_origin(config: TrainingConfig, origin: Path | None, *, base: str) -> TrainingConfig:
    """Return the configuration with the seed of the checkpoint that the run resumes from.

    Raises UserError when base, LoRA or optimizer do not fit, or no steps are left.
    """
    if origin is None:
        return config
    if not checkpoints.is_checkpoint(origin):
        adapter = config.adapter
        check_adapter(origin / checkpoints.LORA, base=base, rank=adapter.rank, alpha=adapter.alpha)
        return config
    state = checkpoints.read_state(origin)
    config = checkpoints.with_seed_of(config, state)
    # Steps that follow from epochs are known only with the samples.
    if config.optimizer.num_train_epochs is None:
        check_unfinished(state, origin, base=base, steps=total_steps(config.optimizer, 0, 1))
    else:
        check_base(state, base)
    return config


def check_unfinished(state: State, origin: Path, *, base: str, steps: int) -> None:
    """Raise UserError unless the state is of this base and steps are left.

    A run that was stopped between its last step and its result may be resumed to write that.
    """
    check_base(state, base)
    has_result = origin.name == TRAINING_STATE or steps_of_result(origin.parent.parent) == steps
    if state.step > steps or (state.step == steps and has_result):
        raise UserError(
            f"the checkpoint has {state.step} steps already and this run ends at {steps}: give a larger "
            "max_train_steps, which counts them all, or another output_dir to start from scratch."
        )


def check_base(state: State, base: str) -> None:
    """Raise UserError unless the state is of this base."""
    if state.base != base:
        raise UserError(
            f"the checkpoint was trained on {state.base} and this run's base is {base}: set COGVIDEOX_MODEL "
            "to the same, or start from scratch in another output_dir."
        )
