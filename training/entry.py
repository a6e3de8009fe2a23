"""The two ways into the trainer: a Cog training, and a command on this machine."""

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lib import weights
from lib.archive import disk_error, extract_tar
from lib.compute import ComputeThread
from lib.errors import UserError
from lib.lock import lock
from lib.scratch import Scratch
from lib.serving.guard import check_file
from lib.sources import check_address, local_sources_allowed, request_rules, save_url
from training import checkpoints
from training.config import TrainingConfig
from training.result import TRAINING_STATE, pack

MAX_OUTPUT_BYTES = 50 * 10**9
KEPT_RUNS = 3
SECRETS = ("hub_token", "wandb_api_key")
Report = Callable[[str], None]


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
        run = _new_run()
        stop = threading.Event()

        def work(folder: Path) -> Path:
            try:
                return pack(_train(config, run, stop=stop, report=print_now), folder / "trained_model.tar")
            except BaseException:
                _tell_what_is_left(run)
                raise

        try:
            with self.scratch.request() as folder:
                path = self.compute.run(lambda: work(folder), stop=stop)
        finally:
            if checkpoints.latest(run) is None:
                shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
        return path


def run_locally(values: Mapping[str, Any], run: Path, *, stop: threading.Event, report: Report) -> Path:
    """Train in this process with the run's folder given; the folder of results."""
    return _train(config_from(values), run, stop=stop, report=report)


def config_from(inputs: Mapping[str, Any]) -> TrainingConfig:
    """The configuration from a request's or a command line's inputs: files checked, secrets opened."""
    values = dict(inputs)
    for name in SECRETS:
        secret = values.get(name)
        values[name] = secret.get_secret_value() if hasattr(secret, "get_secret_value") else secret or ""
    if values.get("input_videos") is not None:
        values["input_videos"] = str(check_file(values["input_videos"]))
    values["validation_images"] = tuple(str(check_file(p)) for p in values.get("validation_images") or ())
    return TrainingConfig(**values)


def print_now(line: str) -> None:
    print(line, flush=True)


def _train(config: TrainingConfig, run: Path, *, stop: threading.Event, report: Report) -> Path:
    from training.trainer import train

    origin = run / "origin"
    try:
        if config.resume_from and checkpoints.latest(run) is None:
            start_from = open_origin(config.resume_from, origin, stop=stop, report=report)
        else:
            start_from = None
        return train(config, run, start_from=start_from, stop=stop, report=report)
    finally:
        shutil.rmtree(origin, ignore_errors=True)


def open_origin(
    given: str, folder: Path, *, stop: threading.Event | None = None, report: Report = print
) -> Path:
    """The folder with what resume_from names: a checkpoint, or at least lora.safetensors.

    `given` is the URL of an output, or, where local sources are allowed, a tar, a folder of results, of a run
    or of a checkpoint. Raises UserError when it is none of these.
    """
    if "://" in given:
        check_address(given)
        archive = folder / "output.tar"
        report("resume_from: downloading the earlier output")
        save_url(given, archive, max_bytes=MAX_OUTPUT_BYTES, rules=request_rules(stop=stop))
        place = extract_tar(archive, folder / "content", max_bytes=MAX_OUTPUT_BYTES)
        archive.unlink()
    else:
        place = Path(given).expanduser()
        if not local_sources_allowed():
            raise UserError(
                f"resume_from={given!r} is a path on the server; give the https:// address of the tar."
            )
        if not place.exists():
            raise UserError(f"resume_from={given} does not exist; give an earlier output or a checkpoint.")
        if place.is_file():
            place = extract_tar(place, folder / "content", max_bytes=MAX_OUTPUT_BYTES)
    for found in (place, place / TRAINING_STATE, checkpoints.latest(place)):
        if found is not None and checkpoints.is_checkpoint(found):
            return found
    for found in (place, place / "output", place / "result"):
        if (found / checkpoints.LORA).is_file():
            return found
    raise UserError(
        f"resume_from={given} holds neither a training state nor {checkpoints.LORA}; give the output of this "
        "trainer, made with save_training_state to go on exactly."
    )


def _new_run() -> Path:
    """A folder for a training's checkpoints; of the earlier runs that did not finish, the newest stay."""
    trainings = weights.cache_folder() / "trainings"
    try:
        trainings.mkdir(parents=True, exist_ok=True)
        earlier = sorted(path for path in trainings.iterdir() if path.is_dir())
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
