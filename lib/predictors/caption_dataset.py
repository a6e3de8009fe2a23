"""What the data-set predictor does behind its signature: an archive of clips -> a zip of captioned clips."""

import contextlib
import hashlib
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lib.caption.record import Record
from lib.datasets.clips import find_clips
from lib.datasets.source import open_data
from lib.errors import UserError
from lib.network.download import sha256_of
from lib.predictors import input_files
from lib.predictors.caption import Service
from lib.predictors.model import MetricSink
from lib.storage.disk import disk_error
from lib.storage.lock import lock
from lib.weights.cache import cache_folder

if TYPE_CHECKING:
    from lib.caption.dataset import DatasetRequest
    from lib.datasets.caption_files import CaptionedDataset

KEPT_RECORDS = 20


@dataclass(kw_only=True, slots=True)
class DatasetCaptionPredictor:
    """Clips -> clips with captions. A request that was killed or cancelled goes on when it comes again."""

    service: Service

    @classmethod
    def start(cls) -> "DatasetCaptionPredictor":
        """As Service.start."""
        return cls(service=Service.start())

    def __call__(self, metrics: MetricSink, *, input_videos: Path, **inputs: object) -> Path:
        """Caption an archive's clips; the zip's path, which stays until the next request or shutdown."""
        from lib.caption.dataset import request_from

        service = self.service
        service.scratch.clear()
        archive = input_files.check_file(input_videos)
        if archive.is_dir():
            raise UserError(f"{archive} is a folder; send a zip or tar of it, or use script/caption.")
        request = request_from(inputs)
        service.captioner.check(request.question)
        stop = threading.Event()
        with service.scratch.request() as folder:
            path, facts = service.compute.run(
                lambda: self._make(archive, folder, request, stop), stop=stop
            )  # fmt: skip
        for name, value in (service.facts | facts).items():
            metrics.record_metric(name, value)
        return path

    def _make(
        self, archive: Path, folder: Path, request: "DatasetRequest", stop: threading.Event
    ) -> tuple[Path, dict[str, object]]:
        """The zip, and what the metrics tell."""
        from lib.caption.dataset import summary
        from lib.datasets.caption_files import pack

        work = folder / "data"
        try:
            question = f"{sha256_of(archive, stop=stop)} {request.question} {self.service.mark}"
            data = open_data(archive, work, stop=stop)
            with resumable(question, folder / "captions.jsonl") as record:
                made, seconds = self._captioned(data, request, record, stop)
                for each in made.left_out:
                    print(f"left out: {each.name}: {each.reason}", flush=True)
                print(summary(made), flush=True)
                path = pack(made, folder / "captioned.zip", videos=request.include_videos, stop=stop)
                record.rewrite(())
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return path, made.counts | ({} if seconds is None else {"seconds_per_clip": seconds})

    def _captioned(
        self, data: Path, request: "DatasetRequest", record: Record, stop: threading.Event
    ) -> "tuple[CaptionedDataset, float | None]":
        """The captioned data set, and the seconds that each clip took for which the model was asked."""
        from lib.caption.batch import caption_clips
        from lib.caption.dataset import captioned, check_left_out

        clips, left_out = find_clips(data, need_captions=False)
        check_left_out(left_out, request)
        known, started = record.read(), time.perf_counter()
        rows = caption_clips(
            self.service.captioner, clips, request.question,
            record=record, known=known, model=self.service.mark, batch_size=request.batch_size,
            report=_print_now, replace=request.replaces, stop_on_failure=request.stops, stop=stop,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        asked = sum(row.status != "kept" and row != known.get(row.file_name) for row in rows)
        try:
            return captioned(clips, left_out, rows, request), round(seconds / asked, 3) if asked else None
        except UserError:  # the next request tries the bad ones again
            record.rewrite(row for row in rows if row.status == "captioned")
            raise


@contextlib.contextmanager
def resumable(question: str, elsewhere: Path) -> Iterator[Record]:
    """The record of a request, by everything that its captions depend on.

    It is kept in the cache folder, with the newest others; where another server is answering the same request
    or nothing can be kept, it is `elsewhere`.
    """
    folder = cache_folder() / "captions"
    path = folder / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.jsonl"
    with contextlib.ExitStack() as stack:
        try:
            mine = stack.enter_context(lock(path, _print_now, wait=False))
            _trim(folder, path)
        except OSError as error:
            print(f"a cancelled request will begin anew: {disk_error(error, path)}", flush=True)
            mine = False
        record = Record(path if mine else elsewhere)
        try:
            yield record
        finally:
            record.close()


def _trim(folder: Path, newest: Path) -> None:
    """Remove the oldest records, but those that are in use."""
    others = [path for path in folder.glob("*.jsonl") if path != newest]
    others.sort(key=lambda path: path.stat().st_mtime)
    for path in others[: max(0, len(others) - KEPT_RECORDS + 1)]:
        with lock(path, _print_now, wait=False) as nobodys:
            if nobodys:
                path.unlink(missing_ok=True)


def _print_now(line: str) -> None:
    print(line, flush=True)
