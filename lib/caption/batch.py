"""Captions for many clips: read ahead while the model writes, in batches, noted as soon as they are done."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch

from lib.cancellation import check_stop
from lib.caption.captioner import Caption, Captioner, CaptionSettings, SampledClip
from lib.caption.record import Record, Row, fingerprint
from lib.datasets.clips import Clip
from lib.errors import UserError
from lib.progress import Report

READERS = max(1, min(4, (os.cpu_count() or 2) - 1))
"""Clips decoded at once, in processes of their own, while the model writes."""


def caption_clips(
    captioner: Captioner, clips: list[Clip], settings: CaptionSettings, *,
    record: Record, known: dict[str, Row], model: str, batch_size: int, report: Report,
    replace: bool = False, stop_on_failure: bool = False, stop: threading.Event | None = None,
) -> list[Row]:  # fmt: skip
    """A row for each clip, in their order, in the record too as soon as it is there.

    Clips that have a caption keep it unless `replace`. What `known` (rows of an earlier run by file name)
    says about the same clip, settings and `model` is not done again, a failure neither. A clip that cannot be
    read is a failed row; with `stop_on_failure` the batch that has one is the last, and what comes after it
    has no row. Raises Stopped, after which the record holds all that was done; UserError when the record
    cannot be written, or the GPU has too little memory for a single clip.
    """
    captioner.check(settings)
    marks = {clip.name: fingerprint(clip, (settings, model)) for clip in clips}
    rows = settled(clips, marks, known, replace=replace)
    waiting = [clip for clip in clips if clip.name not in rows]
    if rows:
        report(f"{len(rows)} of {len(clips)} clips are done already")
    if stop_on_failure and any(row.status == "failed" for row in rows.values()):
        waiting = []
    progress, at_once = _Progress(len(waiting), report), batch_size
    with contextlib.closing(_read_ahead(captioner, waiting, settings, 2 * batch_size, stop)) as read:
        while batch := list(islice(read, batch_size)):
            done = [
                Row(file_name=clip.name, status="failed", error=str(sampled), fingerprint=marks[clip.name])
                for clip, sampled in batch
                if isinstance(sampled, UserError)
            ]
            sound = [(clip, sampled) for clip, sampled in batch if isinstance(sampled, SampledClip)]
            captions, at_once = within_memory(
                captioner, [sampled for _, sampled in sound], settings,
                at_once=at_once, report=report, stop=stop,
            )  # fmt: skip
            for (clip, _), caption in zip(sound, captions, strict=True):
                done.append(_row(clip, caption, marks[clip.name]))
            record.add(done)
            rows |= {row.file_name: row for row in done}
            failed = sum(row.status == "failed" for row in done)
            progress(len(done), failed=failed)
            if failed and stop_on_failure:
                break
    return [rows[clip.name] for clip in clips if clip.name in rows]


def settled(
    clips: list[Clip], marks: dict[str, str], known: dict[str, Row], *, replace: bool
) -> dict[str, Row]:
    """File name -> row of the clips for which the model is not needed: they have a caption, or a row."""
    rows = {}
    for clip in clips:
        earlier = known.get(clip.name)
        if clip.caption and not replace:
            rows[clip.name] = Row(file_name=clip.name, status="kept", caption=clip.caption)
        elif earlier and earlier.fingerprint == marks[clip.name]:
            rows[clip.name] = earlier
    return rows


def _row(clip: Clip, caption: Caption, mark: str) -> Row:
    if not caption.text:
        return Row(
            file_name=clip.name, status="failed", error="the model said nothing about it", fingerprint=mark
        )
    return Row(
        file_name=clip.name, status="captioned", caption=caption.text, finished=caption.finished,
        fingerprint=mark,
    )  # fmt: skip


def _read_ahead(
    captioner: Captioner, clips: list[Clip], settings: CaptionSettings, ahead: int,
    stop: threading.Event | None,
) -> Iterator[tuple[Clip, SampledClip | UserError]]:  # fmt: skip
    """The clips in their order, each with its frames or why there are none; at most `ahead` are held."""

    def read(clip: Clip) -> SampledClip | UserError:
        check_stop(stop)
        try:
            return captioner.sample(clip.path, settings, stop=stop)
        except UserError as error:
            return error

    pool = ThreadPoolExecutor(READERS, thread_name_prefix="clip")
    try:
        queue: list[tuple[Clip, Future]] = []
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


def within_memory(
    captioner: Captioner, clips: list[SampledClip], settings: CaptionSettings, *,
    at_once: int, report: Report, on_token: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> tuple[list[Caption], int]:  # fmt: skip
    """As captioner.caption, `at_once` clips together or, where the GPU's memory is too small, ever fewer.

    Returns the captions and how many clips fit together. Raises UserError when not even one does; Stopped.
    """
    captions: list[Caption] = []
    while part := clips[len(captions) : len(captions) + at_once]:
        try:
            captions += captioner.caption(part, settings, on_token=on_token, stop=stop)
            continue
        except torch.OutOfMemoryError:  # gone, with what the try had made, when the memory is emptied
            if len(part) == 1:
                raise UserError(
                    "the GPU has too little memory for one clip. COGVIDEOX_QUANTIZATION=8bit or 4bit makes "
                    "the model smaller."
                ) from None
        torch.cuda.empty_cache()
        at_once = len(part) // 2
        report(f"a batch of {len(part)} does not fit into the GPU's memory: {at_once} at once from here on")
    return captions, at_once


class _Progress:
    """Counts clips, and says how long the rest will take at the pace so far."""

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
        self.report(f"progress: captioning {self.done}/{self.total}, {', '.join(notes)}")
