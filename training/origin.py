"""What a run goes on from: its own newest checkpoint, or an earlier output that resume_from names."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lib.errors import UserError
from lib.network.http import Source, save, without_secrets
from lib.network.urls import check_address, local_sources_allowed, request_rules
from lib.progress import Report
from lib.storage.archive import extract_tar
from training import checkpoints
from training.devices import from_main
from training.result import RESULT, TRAINING_STATE

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_OUTPUT_BYTES = 50 * 10**9


@contextlib.contextmanager
def found_origin(
    resume_from: str, run: Path, accelerator: "Accelerator", *, stop: threading.Event | None, report: Report
) -> Iterator[Path | None]:
    """The folder to go on from, or None to begin anew; what is unpacked for it goes after the block.

    The run's own checkpoints come before `resume_from`. One process fetches, the others use what it found.
    """
    work = run / "origin"

    def find() -> Path | None:
        newest = checkpoints.latest(run)
        if newest is not None or not resume_from:
            return newest
        shutil.rmtree(work, ignore_errors=True)  # what a killed process left
        return open_origin(resume_from, work, stop=stop, report=report)

    try:
        yield from_main(accelerator, find)
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(work, ignore_errors=True)


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
        rules = request_rules(stop=stop)
        save(Source(url=given, max_bytes=MAX_OUTPUT_BYTES, rules=rules), archive)
        place = extract_tar(archive, folder / "content", max_bytes=MAX_OUTPUT_BYTES)
        archive.unlink()
    else:
        if not local_sources_allowed():
            raise UserError(
                f"resume_from={given!r} is a path on the server; give the https:// address of the tar."
            )
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
        f"resume_from={without_secrets(given)} holds neither a training state nor {checkpoints.LORA}; give "
        "the output of this trainer, made with save_training_state to go on exactly."
    )
