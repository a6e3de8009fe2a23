"""Captions for many clips: clips are read ahead while the model generates, batch by batch."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch

from lib.cancellation import check_stop, untimed
from lib.caption.captioner import Caption, Captioner, SampledClip
from lib.caption.dataset import known_rows
from lib.caption.journal import Journal, Row, fingerprint
from lib.caption.request import CaptionSettings
from lib.datasets.clips import Clip
from lib.errors import UserError
from lib.progress import Report, progress_line
from lib.video.reader import open_video

READERS = max(1, min(4, (os.cpu_count() or 2) - 1))
"""Clips that are decoded at the same time, each in a process of its own."""


def caption_clips(
    captioner: Captioner, clips: list[Clip], settings: CaptionSettings, *,
    journal: Journal, known: dict[str, Row], model: str, batch_size: int, report: Report,
    replace: bool = False, stop_on_failure: bool = False, stop: threading.Event | None = None,
) -> list[Row]:  # fmt: skip
    """Return a row for each clip in order; each is added to the journal as soon as it is known.

    Args:
        known: Rows of an earlier run by file name. Those about the same clip, settings and model are
            returned again, failures included.
        model: Identifies the model in fingerprints.
        replace: Whether to caption clips that have a caption already.
        stop_on_failure: Whether to end after the first batch with an unreadable clip; later clips have no
            row.

    Raises:
        Stopped: The journal has everything that was done.
        UserError: The journal cannot be written, or the GPU has too little memory for one clip.
    """
    captioner.check(settings)
    fingerprints = {clip.name: fingerprint(clip, (settings, model)) for clip in clips}
    rows = known_rows(clips, fingerprints, known, replace=replace)
    waiting = [clip for clip in clips if clip.name not in rows]
    if rows:
        report(f"{len(rows)} of {len(clips)} clips are done already")
    if stop_on_failure and any(row.status == "failed" for row in rows.values()):
        waiting = []
    progress = _Progress(len(waiting), report)
    limit = batch_size
    with contextlib.closing(_read_ahead(captioner, waiting, settings, 2 * batch_size, stop)) as read:
        while batch := list(islice(read, batch_size)):
            sampled = [item for _, item in batch if isinstance(item, SampledClip)]
            captions, limit = caption_within_memory(
                captioner, sampled, settings, limit=limit, report=report, stop=stop
            )
            results = iter(captions)
            done = [
                _row(clip, next(results) if isinstance(item, SampledClip) else item, fingerprints[clip.name])
                for clip, item in batch
            ]
            journal.add(done)
            rows |= {row.file_name: row for row in done}
            failed = sum(row.status == "failed" for row in done)
            progress(len(done), failed=failed)
            if failed and stop_on_failure:
                break
    return [rows[clip.name] for clip in clips if clip.name in rows]


def _row(clip: Clip, result: Caption | UserError, fingerprint: str) -> Row:
    if isinstance(result, UserError) or not result.text:
        error = str(result) if isinstance(result, UserError) else "the model generated an empty caption"
        return Row(file_name=clip.name, status="failed", error=error, fingerprint=fingerprint)
    return Row(
        file_name=clip.name, status="captioned", caption=result.text, finished=result.finished,
        fingerprint=fingerprint,
    )  # fmt: skip


def _read_ahead(
    captioner: Captioner, clips: list[Clip], settings: CaptionSettings, ahead: int,
    stop: threading.Event | None,
) -> Generator[tuple[Clip, SampledClip | UserError], None, None]:  # fmt: skip
    """Yield the clips in order with their frames or their error, holding at most `ahead` of them."""

    def read(clip: Clip) -> SampledClip | UserError:
        check_stop(stop)
        try:
            with open_video(clip.path, stop=stop) as video:
                return captioner.sample(video, settings)
        except UserError as error:
            return error

    pool = ThreadPoolExecutor(READERS, thread_name_prefix="clip")
    try:
        queue: list[tuple[Clip, Future[SampledClip | UserError]]] = []
        upcoming = iter(clips)
        while True:
            for clip in islice(upcoming, ahead - len(queue)):
                queue.append((clip, pool.submit(read, clip)))
            if not queue:
                return
            clip, future = queue.pop(0)
            yield clip, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def caption_within_memory(
    captioner: Captioner, clips: list[SampledClip], settings: CaptionSettings, *,
    limit: int, report: Report, on_token: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> tuple[list[Caption], int]:  # fmt: skip
    """Describe clips in batches of `limit`, halved whenever the GPU runs out of memory.

    Returns the captions and the batch size that fits. Raises UserError if a single clip does not; Stopped.
    """
    captions: list[Caption] = []
    while batch := clips[len(captions) : len(captions) + limit]:
        try:
            with untimed(stop):
                captions += captioner.caption(batch, settings, on_token=on_token, stop=stop)
            continue
        except torch.OutOfMemoryError:  # only after this block are the failed attempt's tensors freed
            if len(batch) == 1:
                raise UserError(
                    "the GPU has too little memory for one clip. COGVIDEOX_QUANTIZATION=int8 or int4 makes "
                    "the model smaller."
                ) from None
        torch.cuda.empty_cache()
        limit = len(batch) // 2
        report(f"a batch of {len(batch)} does not fit into the GPU's memory: batches of {limit} from now on")
    return captions, limit


class _Progress:
    """Reports finished clips and an estimate of the time left."""

    def __init__(self, total: int, report: Report) -> None:
        self.total, self.report = total, report
        self.done = self.failed = 0
        self.started = time.monotonic()

    def __call__(self, count: int, *, failed: int) -> None:
        self.done += count
        self.failed += failed
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        notes = [f"{int(left) // 60}:{int(left) % 60:02d} left"]
        notes += [f"{self.failed} failed"] if self.failed else []
        self.report(progress_line("captioning", self.done, self.total, ", ".join(notes)))
