"""Combine clips with the rows of a journal into a captioned data set."""

import dataclasses

from lib.caption.journal import Row
from lib.caption.request import DatasetRequest
from lib.datasets.caption_files import CaptionedDataset
from lib.datasets.clips import Clip, LeftOut
from lib.errors import UserError


def known_rows(
    clips: list[Clip], fingerprints: dict[str, str], known: dict[str, Row], *, replace: bool
) -> dict[str, Row]:
    """Return the rows, by file name, of clips that the model need not caption: with a caption or a row."""
    rows = {}
    for clip in clips:
        earlier = known.get(clip.name)
        if clip.caption and not replace:
            rows[clip.name] = Row(file_name=clip.name, status="kept", caption=clip.caption)
        elif earlier and earlier.fingerprint == fingerprints[clip.name]:
            rows[clip.name] = earlier
    return rows


def captioned_dataset(
    clips: list[Clip], left_out: list[LeftOut], rows: list[Row], request: DatasetRequest
) -> CaptionedDataset:
    """Combine clips and rows. Raises UserError as check_left_out does, and if no clip has a caption."""
    by_name = {row.file_name: row for row in rows}
    usable, new, unusable = [], set(), list(left_out)
    for clip in clips:
        row = by_name.get(clip.name)
        if row is None:  # the run ended at a bad clip before this one
            continue
        if row.status == "failed":
            unusable.append(LeftOut(name=clip.name, reason=row.error))
        elif row.status == "kept":
            usable.append(clip)
        else:
            usable.append(dataclasses.replace(clip, caption=request.full_caption(row.caption)))
            new.add(clip.name)
    unusable.sort(key=lambda each: each.name)
    check_left_out(unusable, request)
    if not usable:
        raise UserError(f"no clip can be captioned:\n{_listed(unusable)}")
    return CaptionedDataset(
        clips=usable,
        new=frozenset(new),
        replaced=frozenset(clip.name for clip in clips if clip.caption and clip.name in new),
        left_out=unusable,
        cut_off=sum(not by_name[name].finished for name in new),
    )


def check_left_out(left_out: list[LeftOut], request: DatasetRequest) -> None:
    """Raise UserError if something is left out and on_bad_clip is stop."""
    if left_out and request.stops_at_bad_clip:
        verb = "clip cannot" if len(left_out) == 1 else "clips cannot"
        raise UserError(f"{len(left_out)} {verb} be captioned, and on_bad_clip is stop:\n{_listed(left_out)}")


def summary(made: CaptionedDataset) -> str:
    """Return one line for the log."""
    counts = made.counts
    parts = [f"{counts['captioned']} captioned"]
    parts += [f"{counts[what]} {what}" for what in ("kept", "failed") if counts[what]]
    parts += [f"{made.cut_off} cut off at max_new_tokens"] if made.cut_off else []
    return f"{counts['clips']} clips: {', '.join(parts)}"


def _listed(left_out: list[LeftOut]) -> str:
    return "\n".join(f"  {each.name}: {each.reason}" for each in left_out)
