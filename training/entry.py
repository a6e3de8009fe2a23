"""The two ways into the trainer: a Cog training, and a command on this machine."""

import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.predictors.compute_thread import ComputeThread
from lib.predictors.input_files import check_file
from lib.progress import Report
from lib.storage.disk import disk_error
from lib.storage.lock import lock
from lib.storage.packing import pack
from lib.storage.scratch import Scratch
from lib.weights.cache import cache_folder
from training import checkpoints
from training.config import SECRETS, TrainingConfig
from training.memory import free_memory

KEPT_RUNS = 3


class CogTrainer:
    """What stays between the trainings of one server: the thread that computes, and the last output."""

    def __init__(self) -> None:
        self.compute, self.scratch = ComputeThread(), Scratch()

    def train(self, **inputs: Any) -> Path:
        """One training; the tar of its results, which stays until the next one or shutdown.

        A run that fails or is cancelled stays on this machine with its checkpoints (the newest three such
        runs), and the log says how to go on from it.
        """
        self.scratch.clear()
        config = config_from(inputs)
        run = _new_run(config.resume_from)
        stop = threading.Event()

        def work(folder: Path) -> Path:
            try:
                return pack(_train(config, run, stop=stop, report=print_now), folder / "trained_model.tar")
            except BaseException:
                _tell_what_is_left(run)
                raise
            finally:
                free_memory()  # the next training needs what this one's models took

        try:
            with self.scratch.request() as folder:
                path = self.compute.run(lambda: work(folder), stop=stop)
        finally:
            if checkpoints.latest(run) is None:
                shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
        return path


def run_locally(config: TrainingConfig, run: Path, *, stop: threading.Event, report: Report) -> Path:
    """Train in this process with the run's folder given; the folder of results."""
    return _train(config, run, stop=stop, report=report)


def config_from(inputs: Mapping[str, Any]) -> TrainingConfig:
    """The configuration from a request's or a command line's inputs: files checked, secrets opened."""
    values = dict(inputs)
    for name in SECRETS:
        secret = values.get(name)
        values[name] = secret.get_secret_value() if hasattr(secret, "get_secret_value") else secret or ""
    if "://" in str(values.get("input_videos") or ""):
        raise UserError(
            f"input_videos={values['input_videos']} is an address; give a folder, zip or tar on this "
            "machine, or dataset_name for a data set of the Hugging Face Hub."
        )
    if values.get("input_videos") is not None:
        values["input_videos"] = str(check_file(values["input_videos"]))
    values["validation_images"] = tuple(str(check_file(p)) for p in values.get("validation_images") or ())
    return TrainingConfig(**values)


def print_now(line: str) -> None:
    print(line, flush=True)


def _train(config: TrainingConfig, run: Path, *, stop: threading.Event, report: Report) -> Path:
    from training.trainer import train  # a command that is refused need not wait for torch

    return train(config, run, stop=stop, report=report)


def _new_run(resume_from: str) -> Path:
    """A folder for a training's checkpoints.

    Of the earlier runs that did not finish, the newest stay, and the one that `resume_from` goes on from.
    """
    trainings = cache_folder() / "trainings"
    try:
        trainings.mkdir(parents=True, exist_ok=True)
        needed = Path(resume_from).absolute()
        folders = (path.absolute() for path in trainings.iterdir() if path.is_dir())
        earlier = sorted(path for path in folders if not needed.is_relative_to(path))
        for path in earlier[: -KEPT_RUNS + 1]:
            with lock(path, print_now, wait=False) as nobodys:
                if nobodys:  # not of a training that another server is running
                    shutil.rmtree(path, ignore_errors=True)
        run = trainings / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        run.mkdir()
    except OSError as error:
        raise disk_error(error, trainings) from error
    return run


def _tell_what_is_left(run: Path) -> None:
    newest = checkpoints.latest(run)
    if newest is not None:
        print_now(f"The newest checkpoint is {newest}; on this machine resume_from={newest} goes on from it.")
