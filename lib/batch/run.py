"""A list of clips made by several batch workers, each of which takes the next row.

This process distributes the rows and alone records their results, as soon as they are known. A row whose
worker dies is tried once more; if that worker dies too, the row has failed.
"""

import contextlib
import shutil
import threading
from collections import Counter, deque
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from lib import settings
from lib.batch.messages import ClipResult, LoadPredictor, MakeClip, PredictorReady, PredictorRefused
from lib.batch.results import Results, result_record
from lib.batch.rows import Row
from lib.cancellation import check_stop
from lib.distributed.child_process import ChildProcess, Exited, gpu_environment
from lib.distributed.layout import VARIABLE
from lib.errors import UserError
from lib.models.specs import DEFAULT_MODELS, VideoTask
from lib.progress import Report, progress_line
from lib.storage.disk import partial_path
from lib.storage.lock import exclusive

MODULE = "lib.batch.worker"
RESULTS, WORK, LOCK = "results.jsonl", ".work", ".parallel"
POLL_SECONDS = 0.1
MAX_DEATHS = 2
"""Deaths of workers at the same row, or on average of each while it loads, before it is given up."""


def make_list(
    task: VideoTask,
    rows: list[Row],
    output: Path,
    *,
    processes: int,
    gpus: int,
    stop: threading.Event,
    report: Report,
) -> int:
    """Make the clips that are missing in the folder `output` and return how many rows failed.

    Raises UserError, and Stopped once `stop` is set, with what is done kept.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"OUTPUT {output} is a file; a list of clips goes to a folder.")
    with exclusive(output / LOCK, f"another process is making clips in {output}; wait for it."):
        current = settings.current()
        model = f"{current.model or DEFAULT_MODELS[task]} {current.default_lora}"
        fingerprints = {row.number: row.fingerprint(model) for row in rows}
        results = Results(output / RESULTS)
        waiting = [
            row
            for row in rows
            if not (results.has(row.number, fingerprints[row.number]) and (output / row.name).is_file())
        ]
        if len(waiting) < len(rows):
            report(f"{len(rows) - len(waiting)} of {len(rows)} clips are done already")
        try:
            if waiting:
                count = min(processes, len(waiting))
                batch = Batch(task=task, output=output, processes=count, gpus=gpus, report=report)
                with contextlib.closing(batch.run(waiting, stop=stop)) as finished:
                    for row, result in finished:
                        results.add(result_record(row, result, fingerprints[row.number]))
        finally:
            results.close()
            shutil.rmtree(output / WORK, ignore_errors=True)
        check_stop(stop)
        failed = results.rewrite(rows)
        report(f"{len(rows) - failed} of {len(rows)} clips are in {output}")
        return failed


@dataclass(kw_only=True, slots=True)
class Batch:
    """The batch workers, and the row that each is making."""

    task: VideoTask
    output: Path
    processes: int
    gpus: int
    report: Report
    _inbox: SimpleQueue[tuple[int, Any]] = field(default_factory=SimpleQueue)
    """Messages, each with its worker's slot."""
    _workers: dict[int, ChildProcess] = field(default_factory=dict)
    """By slot: 0, 1, ..., each of which is a GPU."""
    _idle: set[int] = field(default_factory=set)
    _rows: dict[int, Row] = field(default_factory=dict)
    """Slot -> the row that is being made there."""
    _deaths: Counter[int] = field(default_factory=Counter)
    """Row number -> the workers that died while making it."""
    _early_deaths: int = 0
    """Workers that died while they were loading, one after the other."""

    def run(self, rows: list[Row], *, stop: threading.Event) -> Generator[tuple[Row, ClipResult], None, None]:
        """Make the rows and yield each one's result.

        Returns early when `stop` is set. Raises UserError when no worker can make any.
        """
        waiting, done = deque(rows), 0
        try:
            for slot in range(self.processes):
                self._start(slot)
            while done < len(rows) and not stop.is_set():
                while waiting and self._idle:
                    self._assign(self._idle.pop(), waiting.popleft())
                with contextlib.suppress(Empty):
                    slot, message = self._inbox.get(timeout=POLL_SECONDS)
                    finished = self._handle(slot, message, waiting)
                    if finished is not None:
                        yield finished
                        done += 1
                        row, result = finished
                        self.report(progress_line("making", done, len(rows)))
                        if result.error:
                            self.report(f"row {row.number}: {result.error}")
        finally:
            for worker in self._workers.values():
                worker.kill()
            for row in self._rows.values():
                self._remove_partial(row)

    def _handle(self, slot: int, message: Any, waiting: deque[Row]) -> tuple[Row, ClipResult] | None:
        """Handle a worker's message; return the row that it finishes, if it does, and its result."""
        if isinstance(message, PredictorRefused):
            raise UserError(message.error)
        if isinstance(message, PredictorReady):
            self._early_deaths = 0
            self._idle.add(slot)
        elif isinstance(message, ClipResult):
            self._idle.add(slot)
            return self._rows.pop(slot), message
        elif isinstance(message, Exited):
            return self._handle_death(slot, message.how, waiting)
        return None

    def _handle_death(self, slot: int, how: str, waiting: deque[Row]) -> tuple[Row, ClipResult] | None:
        """Restart a worker that died, and return its row to the queue or give it up."""
        self._idle.discard(slot)
        row, finished = self._rows.pop(slot, None), None
        if row is None:
            self._early_deaths += 1
            if self._early_deaths >= MAX_DEATHS * self.processes:
                raise UserError(f"A process {how} while it was loading the model, again and again.")
        else:
            self._remove_partial(row)
            self._deaths[row.number] += 1
            if self._deaths[row.number] < MAX_DEATHS:
                self.report(f"row {row.number}: its process {how}; trying again")
                waiting.appendleft(row)
            else:
                error = f"Its process {how}, twice."
                finished = row, ClipResult(number=row.number, metrics={}, error=error)
        self._start(slot)
        return finished

    def _start(self, slot: int) -> None:
        work = self.output / WORK / str(slot)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        environment = gpu_environment(slot, processes=self.processes, gpus=self.gpus)
        environment |= {VARIABLE: "off", "TMPDIR": str(work.resolve())}
        worker = ChildProcess(
            MODULE, on_message=lambda message: self._inbox.put((slot, message)), environment=environment
        )
        self._workers[slot] = worker
        worker.send(LoadPredictor(task=self.task))

    def _assign(self, slot: int, row: Row) -> None:
        self._rows[slot] = row
        output = self.output.resolve() / row.name
        self._workers[slot].send(MakeClip(number=row.number, inputs=row.inputs, output=output))

    def _remove_partial(self, row: Row) -> None:
        partial_path(self.output / row.name).unlink(missing_ok=True)
