"""Captions for clips that have none, by a captioning model that is gone before the base is loaded.

What it says is in the run's folder as soon as it is known (captions.jsonl, of further processes
captions.1.jsonl and so on), later in checkpoints and the result, and is never asked twice.
"""

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lib.caption.journal import Journal, Row, fingerprint
from lib.datasets.clips import Clip, LeftOut
from lib.errors import UserError
from lib.models import derive, specs
from lib.predictors.model import Model
from lib.progress import Report
from training import checkpoints
from training.devices import from_main
from training.memory import free_memory
from training.plan import Plan, captioner_name, label, locate_captioner
from training.prepare import WITHOUT_CAPTION, check_left_out, gather, tell_left_out

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lib.caption.captioner import Captioner
    from lib.caption.request import CaptionSettings

BATCH = 4
"""Clips described together; where the GPU is too small for it, fewer."""
SHOWN = 3
"""How many captions the log shows."""
MAX_RECORD_BYTES = 64 << 20
"""Of the captions that an earlier output, maybe a stranger's, holds."""


def write_captions(
    plan: Plan, clips: list[Clip], left_out: list[LeftOut], run: Path, accelerator: "Accelerator", *,
    origin: Path | None, stop: threading.Event, report: Report,
) -> tuple[list[Clip], list[LeftOut], list[Row]]:  # fmt: skip
    """Caption the clips without a caption, each process its share.

    Returns the clips, all with a caption; what is left out, with those that could not be captioned; and for
    every clip where its caption is from. `origin` is the checkpoint or the output that the run goes on from.
    Raises UserError when no clip is left or the captioner does not fit this machine; Stopped.
    """
    from lib.caption.request import DEFAULT_PROMPT, CaptionSettings

    name = captioner_name(plan.config, plan.base)
    settings = CaptionSettings(
        prompt=plan.config.autocaption_prompt.strip() or DEFAULT_PROMPT,
        max_new_tokens=plan.spec.text_tokens,  # the base reads no more
    )
    rows = {
        clip.name: Row(file_name=clip.name, status="kept", caption=clip.caption)
        for clip in clips
        if clip.caption
    }
    lacking = [clip for clip in clips if not clip.caption]
    # As caption_clips names what it writes, so that rows of an earlier run are found.
    marks = {clip.name: fingerprint(clip, (settings, label(name))) for clip in lacking}
    known = from_main(accelerator, lambda: _known(run, origin, marks))
    waiting = [clip for clip in lacking if clip.name not in known]
    if known:
        report(f"{len(known)} of {len(lacking)} clips without a caption were captioned by an earlier run")
    if waiting:
        # Every process has the same list, as `known` is the first one's.
        share = waiting[accelerator.process_index :: accelerator.num_processes]
        made = _caption(share, settings, name, run, accelerator, stop=stop, report=report)
        known |= {row.file_name: row for rows in gather(made, accelerator) for row in rows}
    rows |= known
    failed = [
        LeftOut(name=clip.name, reason=f"{WITHOUT_CAPTION}{rows[clip.name].error}")
        for clip in lacking
        if rows[clip.name].status == "failed"
    ]
    _tell([rows[clip.name] for clip in lacking], settings, report)
    tell_left_out(failed, report)
    left_out = [*left_out, *failed]
    captioned = [replace(clip, caption=caption) for clip in clips if (caption := rows[clip.name].caption)]
    if not captioned:
        check_left_out(plan.config, left_out, usable=0)
    return captioned, left_out, [rows[clip.name] for clip in clips]


def as_lines(rows: list[Row]) -> str:
    """The content of checkpoints.CAPTIONS: a table that a data set can have as its metadata.jsonl."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def _known(run: Path, origin: Path | None, marks: dict[str, str]) -> dict[str, Row]:
    """What the run's folder and the origin say about clips with these fingerprints, now all in the folder."""
    own = {}
    for path in sorted(run.glob("captions*.jsonl")):
        own |= _rows(path, marks)
    foreign = {} if origin is None else _rows(origin / checkpoints.CAPTIONS, marks)
    more = [row for name, row in foreign.items() if name not in own and row.status == "captioned"]
    if more:
        record = Journal(run / "captions.jsonl")
        try:
            record.add(more)
        finally:
            record.close()
    return own | {row.file_name: row for row in more}


def _rows(path: Path, marks: dict[str, str]) -> dict[str, Row]:
    """The rows of a file about these clips; what a stranger wrote into it may be anything."""
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return {}
        found = Journal(path).read()
        as_lines(list(found.values())).encode()  # half a surrogate pair has no UTF-8
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return {
        name: row
        for name, row in found.items()
        if name in marks
        and row.fingerprint == marks[name]
        and isinstance(row.caption, str)
        and (row.status == "captioned") == bool(row.caption.strip())
    }


def _caption(
    clips: list[Clip], settings: "CaptionSettings", name: str, run: Path, accelerator: "Accelerator", *,
    stop: threading.Event, report: Report,
) -> list[Row]:  # fmt: skip
    """Rows of this process's clips; the captioner is loaded for them and gone afterwards."""
    from lib.caption.batch import caption_clips

    place = accelerator.process_index
    record = Journal(run / (f"captions.{place}.jsonl" if place else "captions.jsonl"))
    try:
        return caption_clips(
            _load(name, report), clips, settings, journal=record, known={}, model=label(name),
            batch_size=BATCH, report=report, stop=stop,
        )  # fmt: skip
    finally:
        record.close()
        free_memory()


def _load(name: str, report: Report) -> "Captioner":
    """On this process's device, in the precision that lib.caption.precision settles for it."""
    from lib.predictors.caption import load_for_this_machine

    folder = locate_captioner(name, report)
    try:
        model = Model(
            spec=derive.spec_for(name, folder),
            folder=folder,
            label=label(name),
            embedded=name in specs.SPECS,
        )
        captioner, precision = load_for_this_machine(model)
    except UserError as error:
        raise UserError(f"autocaption with {label(name)}: {error}") from error
    report(f"captioning with {label(name)} on {precision}")
    return captioner


def _tell(rows: list[Row], settings: "CaptionSettings", report: Report) -> None:
    """How many clips have a caption now, and the first of them."""
    made = [row for row in rows if row.status == "captioned"]
    if not made:
        return
    cut = sum(not row.finished for row in made)
    notes = f", {cut} of them cut off at {settings.max_new_tokens} tokens" if cut else ""
    report(f"{len(made)} of {len(rows)} clips without a caption are captioned{notes}:")
    for row in made[:SHOWN]:
        report(f"  {row.file_name}: {row.caption}")
    if len(made) > SHOWN:
        report(f"  and {len(made) - SHOWN} more")
