"""Conversions by the commands of this machine: one process at a time for a target, nothing left beside it."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lib.convert.request import LoraRequest, ModelRequest
from lib.errors import UserError
from lib.predictors.convert_files import Given, brought
from lib.progress import Report
from lib.storage.disk import disk_error
from lib.storage.lock import lock


def convert_model(
    transformer: Given,
    vae: Given,
    request: ModelRequest,
    *,
    target: Path,
    report: Report,
    stop: threading.Event,
) -> Path:
    """Convert a transformer, a VAE or both into the new folder `target` and return it.

    Raises UserError and Stopped; a failed upload to the Hub is an error, after which the folder is there all
    the same.
    """
    with _alone(target) as work:
        repository = request.repository()
        with ExitStack() as opened:
            small = opened.enter_context(brought(vae, work=work, report=report, stop=stop))
            large = opened.enter_context(brought(transformer, work=work, report=report, stop=stop))
            request.convert(large, small, target, report=report, stop=stop)
        if repository is not None:
            repository.upload(target, message="Converted weights and their report")
            report(f"uploaded to {repository.address}")
    return target


def convert_lora(
    given: Given, request: LoraRequest, *, target: Path, report: Report, stop: threading.Event
) -> Path:
    """Convert a LoRA into the new folder `target` and return its file there. Raises as convert_model."""
    with _alone(target) as work, brought(given, work=work, report=report, stop=stop) as source:
        _, path = request.convert(source, target, report=report, stop=stop)
    return path


@contextmanager
def _alone(target: Path) -> Iterator[Path]:
    """A folder for archives' content while no other process makes the same target."""
    work = target.with_name(f"{target.name}.work.partial")
    with ExitStack() as held:
        try:
            mine = held.enter_context(lock(target, lambda line: None, wait=False))
        except OSError as error:
            raise disk_error(error, target) from error
        if not mine:
            raise UserError(f"Another process is converting into {target}; wait for it.")
        held.callback(shutil.rmtree, work, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
        yield work
