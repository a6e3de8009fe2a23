"""A list of clips by several processes, each of which takes the next; begun again where one is lost.

This process deals out the rows and alone writes down what became of them, a line of JSON each, as soon as it
is known. A row whose process died is dealt out once more; a second death is its result.
"""

import contextlib
import json
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from lib.batch.messages import Begin, Begun, Made, Make, Refused
from lib.batch.rows import Row
from lib.commands.common import FAILED, INTERRUPTED
from lib.distributed.clip import partial_of
from lib.distributed.layout import VARIABLE
from lib.distributed.process import Ended, Process, own_gpu
from lib.errors import UserError
from lib.models import specs
from lib.progress import LogView
from lib.storage.disk import disk_error
from lib.storage.lock import lock

MODULE = "lib.batch.worker"
RESULTS, WORK, LOCK = "results.jsonl", ".work", ".parallel"
POLL_SECONDS = 0.1
MOST_DEATHS = 2
"""Of processes at the same row, or each while it loads: after so many it is given up."""


def make_list(
    task: str, rows: list[Row], output: Path, *, processes: int, gpus: int, stop: threading.Event
) -> int:
    """Make what is missing in the folder `output`; the exit status. Raises UserError."""
    view = LogView()
    try:
        with _alone(output):
            model = os.environ.get("COGVIDEOX_MODEL") or specs.DEFAULT_MODELS[task]
            model = f"{model} {os.environ.get('COG_WEIGHTS', '')}"
            marks = {row.number: row.fingerprint(model) for row in rows}
            results = Results(output / RESULTS)
            done = {
                row.number
                for row in rows
                if results.has(row.number, marks[row.number]) and (output / row.name).is_file()
            }
            if done:
                view.line(f"{len(done)} of {len(rows)} clips are done already")
            waiting = [row for row in rows if row.number not in done]
            try:
                if waiting:
                    count = min(processes, len(waiting))
                    batch = Batch(task=task, output=output, processes=count, gpus=gpus, view=view)
                    batch.run(waiting, marks=marks, results=results, stop=stop)
            finally:
                results.close()
                shutil.rmtree(output / WORK, ignore_errors=True)
            if stop.is_set():
                view.line("stopped; the same command goes on")
                return INTERRUPTED
            failed = results.settle(rows, marks)
            view.line(f"{len(rows) - failed} of {len(rows)} clips are in {output}")
            return FAILED if failed else 0
    finally:
        view.close()


@dataclass(kw_only=True, slots=True)
class Batch:
    """The processes, and what each is at."""

    task: str
    output: Path
    processes: int
    gpus: int
    view: LogView
    _heard: SimpleQueue = field(default_factory=SimpleQueue)
    """(place, message)."""
    _makers: dict[int, Process] = field(default_factory=dict)
    """By place: 0, 1, ..., each of which is a GPU."""
    _idle: set[int] = field(default_factory=set)
    _at: dict[int, Row] = field(default_factory=dict)
    """Place -> the row that is being made there."""
    _deaths: Counter[int] = field(default_factory=Counter)
    """Row number -> the processes it has cost."""
    _early_deaths: int = 0
    """Processes in a row that ended while they were loading."""

    def run(
        self, rows: list[Row], *, marks: dict[int, str], results: "Results", stop: threading.Event
    ) -> None:
        """Make the rows. Raises UserError where no process can make any; returns early when stopped."""
        waiting, done = deque(rows), 0
        try:
            for place in range(self.processes):
                self._start(place)
            while done < len(rows) and not stop.is_set():
                while waiting and self._idle:
                    self._deal(self._idle.pop(), waiting.popleft())
                with contextlib.suppress(Empty):
                    place, message = self._heard.get(timeout=POLL_SECONDS)
                    for row, made in self._answer(place, message, waiting):
                        results.add(_result(row, made, marks[row.number]))
                        done += 1
                        self.view.line(f"progress: making {done}/{len(rows)}")
                        if made.error:
                            self.view.line(f"row {row.number}: {made.error}")
        finally:
            for process in self._makers.values():
                process.kill()
            for row in self._at.values():
                self._partial(row).unlink(missing_ok=True)

    def _answer(self, place: int, message: Any, waiting: "deque[Row]") -> Iterator[tuple[Row, Made]]:
        """Do what a message asks for; yields the row that is settled by it, if one is."""
        if isinstance(message, Refused):
            raise UserError(message.error)
        if isinstance(message, Begun):
            self._early_deaths = 0
            self._idle.add(place)
        elif isinstance(message, Made):
            self._idle.add(place)
            yield self._at.pop(place), message
        elif isinstance(message, Ended):
            self._idle.discard(place)
            row = self._at.pop(place, None)
            if row is None:
                self._early_deaths += 1
                if self._early_deaths >= MOST_DEATHS * self.processes:
                    raise UserError(
                        f"A process {message.how} while it was loading the model, again and again."
                    )
            else:
                self._partial(row).unlink(missing_ok=True)
                self._deaths[row.number] += 1
                if self._deaths[row.number] < MOST_DEATHS:
                    self.view.line(f"row {row.number}: its process {message.how}; it is made again")
                    waiting.appendleft(row)
                else:
                    yield row, Made(number=row.number, metrics={}, error=f"Its process {message.how}, twice.")
            self._start(place)

    def _start(self, place: int) -> None:
        work = self.output / WORK / str(place)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        alone = {VARIABLE: "off", "TMPDIR": str(work.resolve())}
        gpu = own_gpu(place, processes=self.processes, gpus=self.gpus)
        self._makers[place] = Process(
            MODULE, hear=lambda message: self._heard.put((place, message)), environment=gpu | alone
        )
        self._makers[place].tell(Begin(task=self.task))

    def _deal(self, place: int, row: Row) -> None:
        self._at[place] = row
        output = self.output.resolve() / row.name
        self._makers[place].tell(Make(number=row.number, inputs=row.inputs, output=output))

    def _partial(self, row: Row) -> Path:
        return partial_of(self.output / row.name)


class Results:
    """results.jsonl: what became of each row, the newest line of a row counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[int, dict[str, Any]] = {}
        self._file = None
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # a last one may be cut off
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    record = json.loads(line)
                    self._known[record["row"]] = record

    def has(self, number: int, mark: str) -> bool:
        """Whether this row, as it stands in the list now, was made."""
        record = self._known.get(number, {})
        return record.get("status") == "made" and record.get("fingerprint") == mark

    def add(self, record: dict[str, Any]) -> None:
        """On the disk when this returns. Raises UserError when the disk refuses."""
        self._known[record["row"]] = record
        try:
            if self._file is None:
                self._file = self.path.open("ab+")
                if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
                    self._file.write(b"\n")
            self._file.write(_line(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error

    def settle(self, rows: list[Row], marks: dict[int, str]) -> int:
        """One line each in the list's order; how many of them failed. Raises UserError."""
        self.close()
        kept = [self._known[row.number] for row in rows]
        partial = partial_of(self.path)
        try:
            partial.write_bytes(b"".join(map(_line, kept)))
            os.replace(partial, self.path)
        except OSError as error:
            raise disk_error(error, self.path) from error
        finally:
            partial.unlink(missing_ok=True)
        return sum(record["status"] == "failed" for record in kept)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _result(row: Row, made: Made, mark: str) -> dict[str, Any]:
    """A line: what was asked for, what was used where it was left open, and what it took."""
    facts: dict[str, Any] = {"row": row.number, "status": "failed" if made.error else "made"}
    facts |= {"error": made.error} if made.error else {"file": row.name}
    return facts | row.given | made.metrics | {"fingerprint": mark}


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the output folder. Raises UserError while another command has it, and where there can be none."""
    if output.exists() and not output.is_dir():
        raise UserError(f"OUTPUT {output} is a file; a list of clips goes to a folder.")
    try:
        with lock(output / LOCK, print, wait=False) as held:
            if not held:
                raise UserError(f"another process is making clips in {output}; wait for it.")
            yield
    except OSError as error:
        raise disk_error(error, output) from error
