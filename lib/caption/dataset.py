"""Captions for a data set: what is asked for, and every clip with its caption or why it has none."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lib.caption.captioner import CaptionSettings
from lib.caption.record import Row
from lib.datasets.caption_files import CaptionedDataset
from lib.datasets.clips import Clip, LeftOut, full_caption
from lib.errors import UserError

CHOICES = {"existing_captions": ("keep", "replace"), "on_bad_clip": ("skip", "stop")}
MAX_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRequest:
    """What is wanted of a data set. Raises UserError for what is not allowed."""

    question: CaptionSettings
    trigger_word: str = ""
    caption_prefix: str = ""
    caption_suffix: str = ""
    existing_captions: Literal["keep", "replace"] = "keep"
    include_videos: bool = True
    batch_size: int = 8
    on_bad_clip: Literal["skip", "stop"] = "skip"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (given := getattr(self, name)) not in allowed:
                raise UserError(f"{name}={given} is unknown; allowed are {', '.join(allowed)}")
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise UserError(f"batch_size={self.batch_size} is out of range: 1 to {MAX_BATCH}")

    @property
    def replaces(self) -> bool:
        """Whether clips that have a caption get another one."""
        return self.existing_captions == "replace"

    @property
    def stops(self) -> bool:
        """Whether a clip that cannot be used ends it all."""
        return self.on_bad_clip == "stop"

    def full(self, caption: str) -> str:
        """A new caption with what is put before and after it."""
        return full_caption(
            caption,
            trigger_word=self.trigger_word,
            caption_prefix=self.caption_prefix,
            caption_suffix=self.caption_suffix,
        )


def request_from(inputs: Mapping[str, Any]) -> DatasetRequest:
    """From the inputs of predict_caption_dataset.py, less the data set itself."""
    asked = {field.name for field in fields(CaptionSettings)}
    question = CaptionSettings(**{name: value for name, value in inputs.items() if name in asked})
    return DatasetRequest(
        question=question, **{name: value for name, value in inputs.items() if name not in asked}
    )


def captioned(
    clips: list[Clip], left_out: list[LeftOut], rows: list[Row], request: DatasetRequest
) -> CaptionedDataset:
    """The data set that the rows make of the clips. Raises UserError as check_left_out, and for no clip."""
    by_name = {row.file_name: row for row in rows}
    sound, new, bad = [], set(), list(left_out)
    for clip in clips:
        row = by_name.get(clip.name)
        if row is None:  # after a bad clip that ends it all
            continue
        if row.status == "failed":
            bad.append(LeftOut(name=clip.name, reason=row.error))
        elif row.status == "kept":
            sound.append(clip)
        else:
            sound.append(replace(clip, caption=request.full(row.caption)))
            new.add(clip.name)
    bad.sort(key=lambda each: each.name)
    check_left_out(bad, request)
    if not sound:
        raise UserError(f"no clip can be captioned:\n{_listed(bad)}")
    cut_off = sum(not by_name[name].finished for name in new)
    replaced = frozenset(clip.name for clip in clips if clip.caption and clip.name in new)
    return CaptionedDataset(clips=sound, new=frozenset(new), replaced=replaced, left_out=bad, cut_off=cut_off)


def check_left_out(left_out: list[LeftOut], request: DatasetRequest) -> None:
    """Raise UserError when something is left out and on_bad_clip says stop."""
    if left_out and request.stops:
        verb = "clip cannot" if len(left_out) == 1 else "clips cannot"
        raise UserError(f"{len(left_out)} {verb} be captioned, and on_bad_clip is stop:\n{_listed(left_out)}")


def summary(made: CaptionedDataset) -> str:
    """One line for the log."""
    counts = made.counts
    parts = [f"{counts['captioned']} captioned"]
    parts += [f"{counts[what]} {what}" for what in ("kept", "failed") if counts[what]]
    parts += [f"{made.cut_off} cut off at max_new_tokens"] if made.cut_off else []
    return f"{counts['clips']} clips: {', '.join(parts)}"


def _listed(left_out: list[LeftOut]) -> str:
    return "\n".join(f"  {each.name}: {each.reason}" for each in left_out)
