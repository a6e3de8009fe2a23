"""Run the trainings of training/train.py, one at a time, and pack their results as a tar."""

import shutil
import time
from pathlib import Path
from secrets import token_hex
from typing import Any

from lib.cancellation import RequestStop
from lib.predictors.compute_thread import ComputeThread
from lib.predictors.input_files import check_file
from lib.progress import print_line
from lib.settings import current
from lib.storage.disk import disk_error
from lib.storage.lock import remove_unused
from lib.storage.packing import pack
from lib.storage.scratch import Scratch
from lib.weights.cache import cache_folder
from training import checkpoints
from training.config import TrainingConfig
from training.devices import free_memory
from training.trainer import train

KEPT_RUNS = 3


class CogTrainer:
    """State that a server keeps between trainings: the compute thread and the last output."""

    def __init__(self) -> None:
        self.compute, self.scratch = ComputeThread(), Scratch()

    def train(self, **inputs: Any) -> Path:
        """Train and return the tar of the results, which stays until the next training or shutdown.

        The checkpoints of a run that fails or is cancelled stay on this machine (those of the newest three
        such runs), and the log says how to resume from them. Raises UserError.
        """
        self.scratch.clear()
        if inputs["input_videos"] is not None:
            inputs["input_videos"] = check_file(inputs["input_videos"])
        inputs["validation_images"] = [check_file(path) for path in inputs["validation_images"] or ()]
        config = TrainingConfig.from_inputs(**inputs)
        run = _new_run(config.checkpoints.resume_from)
        stop = RequestStop(current().prepare_seconds)

        def work(folder: Path) -> Path:
            try:
                return pack(train(config, run, stop=stop, report=print_line), folder / "trained_model.tar")
            except BaseException:
                _report_checkpoint(run)
                raise
            finally:
                free_memory()  # for the next training

        try:
            with self.scratch.request() as folder:
                path = self.compute.run(lambda: work(folder), stop=stop)
        finally:
            if checkpoints.latest(run) is None:
                shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
        return path


def _new_run(resume_from: str) -> Path:
    """Make a folder for a training's checkpoints.

    Of the earlier runs that did not finish, the newest stay, and the one that `resume_from` names.
    """
    trainings = cache_folder() / "trainings"
    try:
        trainings.mkdir(parents=True, exist_ok=True)
        needed = Path(resume_from).absolute()
        folders = (path.absolute() for path in trainings.iterdir() if path.is_dir())
        earlier = sorted(path for path in folders if not needed.is_relative_to(path))
        remove_unused(earlier[: -KEPT_RUNS + 1])  # not those of another server's trainings
        run = trainings / f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(3)}"
        run.mkdir()
    except OSError as error:
        raise disk_error(error, trainings) from error
    return run


def _report_checkpoint(run: Path) -> None:
    newest = checkpoints.latest(run)
    if newest is not None:
        print_line(
            f"The newest checkpoint is {newest}; resume_from={newest} continues from it on this machine."
        )
