"""Captions for clips that have none, by a captioning model that is freed before the base is loaded.

Captions are written to the run's folder as soon as they are made (captions.jsonl, of further processes
captions.1.jsonl and so on), later to checkpoints and the result. No clip is captioned twice.
"""

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator

from lib.caption.batch import caption_clips
from lib.caption.captioner import Captioner
from lib.caption.journal import Journal, Row, fingerprint
from lib.caption.request import DEFAULT_PROMPT, CaptionSettings
from lib.datasets.clips import Clip, LeftOut
from lib.errors import UserError
from lib.models import derive, specs
from lib.predictors.caption import load_for_this_machine
from lib.predictors.model import Model
from lib.progress import Report
from training import checkpoints
from training.devices import free_memory, from_main, gather_in_order
from training.groups import DataConfig
from training.plan import Plan, captioner_name, label, locate_captioner
from training.prepare import WITHOUT_CAPTION, check_left_out, report_left_out

BATCH = 4
"""Clips captioned at a time; fewer where the GPU is too small."""
SHOWN = 3
"""How many captions are logged."""
MAX_JOURNAL_BYTES = 64 << 20
"""Largest captions file that is read from an earlier output, which may come from an untrusted caller."""


def write_captions(
    config: DataConfig, plan: Plan, clips: list[Clip], left_out: list[LeftOut], run: Path,
    accelerator: Accelerator, *, origin: Path | None, stop: threading.Event, report: Report,
) -> tuple[list[Clip], list[LeftOut], list[Row]]:  # fmt: skip
    """Caption the clips that have no caption, each process its share.

    Returns the clips, all with a caption; the clips that are left out, those that could not be captioned
    among them; and the origin of every clip's caption. `origin` is the checkpoint or output that the run
    resumes from. Raises UserError when no clip is left or the captioner does not fit this machine; Stopped.
    """
    name = captioner_name(config, plan.base)
    settings = CaptionSettings(
        prompt=config.autocaption_prompt.strip() or DEFAULT_PROMPT,
        max_new_tokens=plan.spec.text_tokens,  # the base reads no more
    )
    rows = {
        clip.name: Row(file_name=clip.name, status="kept", caption=clip.caption)
        for clip in clips
        if clip.caption
    }
    missing = [clip for clip in clips if not clip.caption]
    # The same fingerprints as caption_clips writes, so that rows of an earlier run are found.
    fingerprints = {clip.name: fingerprint(clip, (settings, label(name))) for clip in missing}
    known = from_main(accelerator, lambda: known_rows(run, origin, fingerprints))
    waiting = [clip for clip in missing if clip.name not in known]
    if known:
        report(f"{len(known)} of {len(missing)} clips without a caption were captioned by an earlier run")
    if waiting:
        # Every process has the same list, as `known` comes from the main process.
        share = waiting[accelerator.process_index :: accelerator.num_processes]
        made = _caption(share, settings, name, run, accelerator, stop=stop, report=report)
        known |= {row.file_name: row for row in gather_in_order(made, accelerator)}
    rows |= known
    failed = [
        LeftOut(name=clip.name, reason=f"{WITHOUT_CAPTION}{rows[clip.name].error}")
        for clip in missing
        if rows[clip.name].status == "failed"
    ]
    _report_captions([rows[clip.name] for clip in missing], settings, report)
    report_left_out(failed, report)
    left_out = [*left_out, *failed]
    captioned = [replace(clip, caption=caption) for clip in clips if (caption := rows[clip.name].caption)]
    if not captioned:
        check_left_out(config, left_out, usable=0)
    return captioned, left_out, [rows[clip.name] for clip in clips]


def as_lines(rows: list[Row]) -> str:
    """Return the content of checkpoints.CAPTIONS, which a data set can use as its metadata.jsonl."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def known_rows(run: Path, origin: Path | None, fingerprints: dict[str, str]) -> dict[str, Row]:
    """Return the captions of clips with these fingerprints from the run's folder and its origin.

    Those of the origin are added to the run's folder.
    """
    own = {}
    for path in sorted(run.glob("captions*.jsonl")):
        own |= _rows(path, fingerprints)
    foreign = {} if origin is None else _rows(origin / checkpoints.CAPTIONS, fingerprints)
    more = [row for name, row in foreign.items() if name not in own and row.status == "captioned"]
    if more:
        with Journal(run / "captions.jsonl") as journal:
            journal.add(more)
    return own | {row.file_name: row for row in more}


def _rows(path: Path, fingerprints: dict[str, str]) -> dict[str, Row]:
    """Return a file's rows about these clips; the file may come from an untrusted caller."""
    try:
        if path.stat().st_size > MAX_JOURNAL_BYTES:
            return {}
        found = Journal(path).read()
        as_lines(list(found.values())).encode()  # a lone surrogate has no UTF-8
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return {
        name: row
        for name, row in found.items()
        if name in fingerprints
        and row.fingerprint == fingerprints[name]
        and isinstance(row.caption, str)
        and (row.status == "captioned") == bool(row.caption.strip())
    }


def _caption(
    clips: list[Clip], settings: CaptionSettings, name: str, run: Path, accelerator: Accelerator, *,
    stop: threading.Event, report: Report,
) -> list[Row]:  # fmt: skip
    """Caption this process's clips; the captioner is loaded for them and freed afterwards."""
    process = accelerator.process_index
    try:
        with Journal(run / (f"captions.{process}.jsonl" if process else "captions.jsonl")) as journal:
            return caption_clips(
                _load(name, report), clips, settings, journal=journal, known={}, model=label(name),
                batch_size=BATCH, report=report, stop=stop,
            )  # fmt: skip
    finally:
        free_memory()


def _load(name: str, report: Report) -> Captioner:
    """Load the captioner on this process's device, in the precision that fits there."""
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


def _report_captions(rows: list[Row], settings: CaptionSettings, report: Report) -> None:
    """Report how many clips have a caption now, and the first captions."""
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
