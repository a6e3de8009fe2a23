"""Caption data sets: an archive of clips -> a zip of captioned clips, resumed after a cancelled request."""

import contextlib
import hashlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cog

from lib.cancellation import RequestStop
from lib.caption.batch import caption_clips
from lib.caption.dataset import captioned_dataset, check_left_out, summary
from lib.caption.journal import Journal
from lib.caption.request import DatasetRequest
from lib.datasets.caption_files import CaptionedDataset, pack
from lib.datasets.clips import find_clips
from lib.datasets.source import open_data
from lib.errors import UserError
from lib.network.download import sha256_of
from lib.predictors import input_files
from lib.predictors.caption import CaptionService
from lib.predictors.model import MetricSink
from lib.progress import print_line
from lib.settings import current
from lib.storage.disk import disk_error
from lib.storage.lock import lock, remove_unused
from lib.weights.cache import cache_folder

KEPT_JOURNALS = 20


class DatasetCaptionPredictor(CaptionService):
    """Caption an archive of clips. A request that was killed or cancelled is resumed when sent again."""

    __slots__ = ()

    def __call__(self, metrics: MetricSink, *, input_videos: Path, **inputs: object) -> cog.Path:
        """Return the path of a zip of captioned clips, which stays until the next request or shutdown.

        `inputs` are those of lib.caption.request.DatasetRequest. Raises UserError.
        """
        self.scratch.clear()
        archive = input_files.check_file(input_videos)
        if archive.is_dir():
            raise UserError(f"{archive} is a folder; send a zip or tar of it, or use script/caption.")
        request = DatasetRequest.from_inputs(inputs)
        self.captioner.check(request.settings)
        stop = RequestStop(current().prepare_seconds)
        with self.scratch.request() as folder:
            path, result = self.compute.run(
                lambda: self._caption_archive(archive, folder, request, stop), stop=stop
            )
        for name, value in (self.setup_metrics | result).items():
            metrics.record_metric(name, value)
        return cog.Path(path)

    def _caption_archive(
        self, archive: Path, folder: Path, request: DatasetRequest, stop: threading.Event
    ) -> tuple[Path, dict[str, object]]:
        """Return the zip and the metrics."""
        work = folder / "data"
        try:
            key = f"{sha256_of(archive, stop=stop)} {request.settings} {self.fingerprint}"
            data = open_data(archive, work, stop=stop)
            with resumable_journal(key, folder / "captions.jsonl") as journal:
                result, seconds = self._caption_clips(data, request, journal, stop)
                for clip in result.left_out:
                    print_line(f"left out: {clip.name}: {clip.reason}")
                print_line(summary(result))
                path = pack(result, folder / "captioned.zip", videos=request.include_videos, stop=stop)
                journal.rewrite(())
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return path, {**result.counts, **({} if seconds is None else {"seconds_per_clip": seconds})}

    def _caption_clips(
        self, data: Path, request: DatasetRequest, journal: Journal, stop: threading.Event
    ) -> tuple[CaptionedDataset, float | None]:
        """Return the captioned data set, and the seconds per clip that the model was run for."""
        clips, left_out = find_clips(data, need_captions=False)
        check_left_out(left_out, request)
        known, started = journal.read(), time.perf_counter()
        rows = caption_clips(
            self.captioner,
            clips,
            request.settings,
            journal=journal,
            known=known,
            model=self.fingerprint,
            batch_size=request.batch_size,
            report=print_line,
            replace=request.replaces_captions,
            stop_on_failure=request.stops_at_bad_clip,
            stop=stop,
        )
        seconds = time.perf_counter() - started
        computed = sum(row.status != "kept" and row != known.get(row.file_name) for row in rows)
        try:
            result = captioned_dataset(clips, left_out, rows, request)
        except UserError:  # the next request tries the failed clips again
            journal.rewrite(row for row in rows if row.status == "captioned")
            raise
        return result, round(seconds / computed, 3) if computed else None


@contextlib.contextmanager
def resumable_journal(key: str, fallback: Path) -> Iterator[Journal]:
    """Open the journal of a request; `key` is everything that its captions depend on.

    The newest KEPT_JOURNALS are kept in the cache folder. Where another server works on the same request,
    or the folder cannot be written, the journal is `fallback`.
    """
    folder = cache_folder() / "captions"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl"
    with contextlib.ExitStack() as stack:
        try:
            owned = stack.enter_context(lock(path, print_line, wait=False))
            _remove_oldest(folder, path)
        except OSError as error:
            print_line(f"a cancelled request will start from scratch: {disk_error(error, path)}")
            owned = False
        with Journal(path if owned else fallback) as journal:
            yield journal


def _remove_oldest(folder: Path, newest: Path) -> None:
    """Remove the oldest journals that are not in use."""
    others = [path for path in folder.glob("*.jsonl") if path != newest]
    others.sort(key=lambda path: path.stat().st_mtime)
    remove_unused(others[: max(0, len(others) - KEPT_JOURNALS + 1)])
