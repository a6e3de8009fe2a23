"""Captions for a data set on this machine's disk: one process or several, going on where one was stopped."""

import contextlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lib.caption.batch import caption_clips, settled
from lib.caption.dataset import (
    DatasetRequest,
    captioned,
    check_left_out,
    request_from,
    summary,
)
from lib.caption.place import RECORD, Place, record_path, record_paths
from lib.caption.record import Record, Row, fingerprint
from lib.datasets.caption_files import CaptionedDataset
from lib.datasets.caption_folder import complete_folder, write_folder
from lib.datasets.clips import Clip, LeftOut, find_clips
from lib.datasets.source import open_data
from lib.distributed.launched import Processes
from lib.errors import UserError
from lib.predictors.caption import load_for_this_machine, model_fingerprint
from lib.predictors.model import Model, resolve_model
from lib.progress import Report
from lib.storage.disk import disk_error
from lib.storage.lock import lock

UNPACKED, LOCK = ".unpacked", ".captions"
"""In the output folder; names that begin so are not looked at for clips."""


def caption_dataset(
    place: Place, inputs: Mapping[str, Any], *, processes: Processes, stop: threading.Event, report: Report,
) -> Path:  # fmt: skip
    """Caption the clips of a folder or archive; the folder in which their captions are.

    `inputs` are those of predict_caption_dataset.py, less the data set; a folder of their own gets the clips
    too unless include_videos is false. Of several processes each does its share, and the first writes.
    Raises UserError, FirstFailedError and Stopped; the records of what is done stay in the output folder, and
    a later call goes on from them.
    """
    request = request_from(inputs)
    model = resolve_model("caption")
    first = processes.is_first
    with alone(place.output) if first else contextlib.nullcontext():
        try:
            data = Path(processes.from_first("data", lambda: _opened(place, request, stop), stop=stop))
            clips, left_out = find_clips(data, need_captions=False)
            mark = model_fingerprint(model)
            marks = {clip.name: fingerprint(clip, (request.question, mark)) for clip in clips}
            done = settled(clips, marks, _known(place.output, marks), replace=request.replaces)
            processes.meet("records read", stop=stop)  # before anybody adds to one
            if done:
                report(f"{len(done)} of {len(clips)} clips are done already")
            waiting = [clip for clip in clips if clip.name not in done]
            if waiting and not _has_ended(done, request):
                share, record = processes.share(waiting), record_path(place.output, processes.rank)
                _caption(model, share, request, Record(record), mark, report, stop)
            if first:
                if processes.count > 1:
                    report("waiting for the other processes")
                processes.meet("captioned", stop=stop)
                report(_finish(place, request, clips, left_out, marks, report))
                _forget(place)
            else:
                processes.arrive("captioned")
        except UserError:
            if first:
                _forget(place)  # what was unpacked; a run that is only stopped finds it again
            raise
    return place.output


def _caption(
    model: Model, clips: list[Clip], request: DatasetRequest, record: Record, mark: str,
    report: Report, stop: threading.Event,
) -> None:  # fmt: skip
    """Caption clips that have no row yet, into the record."""
    captioner, precision = load_for_this_machine(model)
    report(f"{model.title} on {precision}")
    try:
        caption_clips(
            captioner, clips, request.question,
            record=record, known={}, model=mark, batch_size=request.batch_size, report=report,
            replace=request.replaces, stop_on_failure=request.stops, stop=stop,
        )  # fmt: skip
    finally:
        record.close()


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold the output folder. Raises UserError while another command captions there, and where none can."""
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(lock(output / LOCK, print, wait=False))
        except OSError as error:
            raise disk_error(error, output) from error
        if not held:
            raise UserError(f"another process is captioning in {output}; wait for it.")
        try:
            yield
        finally:
            stack.close()
            with contextlib.suppress(OSError):
                output.rmdir()  # only if it stayed empty


def _opened(place: Place, request: DatasetRequest, stop: threading.Event) -> str:
    """The folder of the clips, looked through once by the first process, which tells what is wrong."""
    data = open_data(place.source, place.output / UNPACKED, stop=stop)
    _, left_out = find_clips(data, need_captions=False)
    check_left_out(left_out, request)
    return str(data)


def _finish(
    place: Place, request: DatasetRequest, clips: list[Clip], left_out: list[LeftOut],
    marks: dict[str, str], report: Report,
) -> str:  # fmt: skip
    """Write the forms from what all processes recorded; a line that says what there is."""
    known = _known(place.output, marks)
    rows = settled(clips, marks, known, replace=request.replaces)
    try:
        made = captioned(clips, left_out, list(rows.values()), request)
        _write(made, place, request, report)
    finally:
        # In one file, and without what failed, which the next run tries again.
        kept = sorted(known.items())
        Record(record_path(place.output, 0)).rewrite(row for _, row in kept if row.status == "captioned")
        for path in record_paths(place.output):
            if path.name != RECORD:
                path.unlink(missing_ok=True)
    return summary(made)


def _write(made: CaptionedDataset, place: Place, request: DatasetRequest, report: Report) -> None:
    for each in made.left_out:
        report(f"left out: {each.name}: {each.reason}")
    if place.in_place:
        complete_folder(made, place.output, report=report)
    else:
        write_folder(made, place.output, videos=request.include_videos)


def _has_ended(done: dict[str, Row], request: DatasetRequest) -> bool:
    """Whether an earlier run met a clip that ends it all."""
    return request.stops and any(row.status == "failed" for row in done.values())


def _known(output: Path, marks: dict[str, str]) -> dict[str, Row]:
    """File name -> row in any of the records; where there are several, the one about this question."""
    found: dict[str, Row] = {}
    for path in record_paths(output):
        for name, row in Record(path).read().items():
            if name not in found or row.fingerprint == marks.get(name):
                found[name] = row
    return found


def _forget(place: Place) -> None:
    if not place.in_place:
        shutil.rmtree(place.output / UNPACKED, ignore_errors=True)
