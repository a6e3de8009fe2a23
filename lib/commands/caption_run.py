"""Captioning a data set on this machine, in one process or several, resuming an earlier run."""

import contextlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lib.caption.batch import caption_clips
from lib.caption.dataset import captioned_dataset, check_left_out, known_rows, summary
from lib.caption.journal import Journal, Row, fingerprint
from lib.caption.request import DatasetRequest
from lib.commands.caption_paths import CaptionPaths
from lib.datasets.caption_folder import complete_folder, write_folder
from lib.datasets.clips import Clip, LeftOut, find_clips
from lib.datasets.source import open_data
from lib.distributed.accelerate_processes import AccelerateProcesses
from lib.errors import UserError
from lib.predictors.caption import load_for_this_machine, model_fingerprint
from lib.predictors.model import Model, resolve_model
from lib.progress import Report
from lib.storage.lock import exclusive

UNPACKED, LOCK = ".unpacked", ".captions"
"""In the output folder; hidden, so that they are not searched for clips."""


def caption_dataset(
    paths: CaptionPaths, inputs: Mapping[str, Any], *, processes: AccelerateProcesses, stop: threading.Event,
    report: Report,
) -> Path:  # fmt: skip
    """Caption the clips of a folder or archive, and return the folder of the captions.

    `inputs` are those of predict_caption_dataset.py without input_videos. Each process captions its share,
    and the first one writes. Raises UserError, FirstProcessError and Stopped; the journals in the output
    folder keep what is done for the next call.
    """
    request = DatasetRequest.from_inputs(inputs)
    model = resolve_model("caption")
    first = processes.is_first
    with output_folder(paths.output) if first else contextlib.nullcontext():
        try:
            data = Path(
                processes.broadcast_from_first("data", lambda: _opened(paths, request, stop), stop=stop)
            )
            clips, left_out = find_clips(data, need_captions=False)
            identity = model_fingerprint(model)
            fingerprints = {clip.name: fingerprint(clip, (request.settings, identity)) for clip in clips}
            known = _read_journals(paths, fingerprints)
            done = known_rows(clips, fingerprints, known, replace=request.replaces_captions)
            processes.barrier("journals read", stop=stop)  # before any process writes to one
            if done:
                report(f"{len(done)} of {len(clips)} clips are done already")
            waiting = [clip for clip in clips if clip.name not in done]
            ended = request.stops_at_bad_clip and any(row.status == "failed" for row in done.values())
            if waiting and not ended:
                with Journal(paths.journal(processes.rank)) as journal:
                    _caption(model, processes.share(waiting), request, journal, identity, report, stop)
            if first:
                if processes.count > 1:
                    report("waiting for the other processes")
                processes.barrier("captioned", stop=stop)
                report(_finish(paths, request, clips, left_out, fingerprints, report))
                _remove_unpacked(paths)
            else:
                processes.arrive("captioned")
        except UserError:
            if first:
                _remove_unpacked(paths)  # only a stopped run keeps it, for the next one
            raise
    return paths.output


def _caption(
    model: Model, clips: list[Clip], request: DatasetRequest, journal: Journal, identity: str,
    report: Report, stop: threading.Event,
) -> None:  # fmt: skip
    """Caption clips that have no row yet."""
    captioner, precision = load_for_this_machine(model)
    report(f"{model.title} on {precision}")
    caption_clips(
        captioner, clips, request.settings,
        journal=journal, known={}, model=identity, batch_size=request.batch_size, report=report,
        replace=request.replaces_captions, stop_on_failure=request.stops_at_bad_clip, stop=stop,
    )  # fmt: skip


@contextlib.contextmanager
def output_folder(output: Path) -> Iterator[None]:
    """Lock the output folder. Raises UserError if another run has it, and for a disk error."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            exclusive(output / LOCK, f"another process is captioning in {output}; wait for it.")
        )
        try:
            yield
        finally:
            stack.close()
            with contextlib.suppress(OSError):
                output.rmdir()  # if the run left it empty


def _opened(paths: CaptionPaths, request: DatasetRequest, stop: threading.Event) -> str:
    """Return the folder of the clips, once the first process has checked it and reported its faults."""
    data = open_data(paths.source, paths.output / UNPACKED, stop=stop)
    _, left_out = find_clips(data, need_captions=False)
    check_left_out(left_out, request)
    return str(data)


def _finish(
    paths: CaptionPaths, request: DatasetRequest, clips: list[Clip], left_out: list[LeftOut],
    fingerprints: dict[str, str], report: Report,
) -> str:  # fmt: skip
    """Write the captions from the journals of all processes, and return the summary."""
    known = _read_journals(paths, fingerprints)
    rows = known_rows(clips, fingerprints, known, replace=request.replaces_captions)
    try:
        made = captioned_dataset(clips, left_out, list(rows.values()), request)
        for each in made.left_out:
            report(f"left out: {each.name}: {each.reason}")
        if paths.in_place:
            complete_folder(made, paths.output, report=report)
        else:
            write_folder(made, paths.output, videos=request.include_videos)
    finally:
        # Merge the journals, without failures: the next run tries those clips again.
        kept = (row for _, row in sorted(known.items()) if row.status == "captioned")
        Journal(paths.journal(0)).rewrite(kept)
        for path in paths.journals():
            if path != paths.journal(0):
                path.unlink(missing_ok=True)
    return summary(made)


def _read_journals(paths: CaptionPaths, fingerprints: dict[str, str]) -> dict[str, Row]:
    """Return a row by file name: of several, the one with the current fingerprint."""
    found: dict[str, Row] = {}
    for path in paths.journals():
        for name, row in Journal(path).read().items():
            if name not in found or row.fingerprint == fingerprints.get(name):
                found[name] = row
    return found


def _remove_unpacked(paths: CaptionPaths) -> None:
    if not paths.in_place:
        shutil.rmtree(paths.output / UNPACKED, ignore_errors=True)
