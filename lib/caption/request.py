"""Validated settings of a request for captions. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lib.datasets.clips import full_caption
from lib.errors import UserError
from lib.text_limits import check_length

DEFAULT_PROMPT = "Please describe this video in detail."
MAX_BATCH = 64

FrameSampling = Literal["auto", "chat", "base", "uniform"]
Template = Literal["chat", "base", "vqa"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSettings:
    """The question about a clip, and how the answer is generated. Raises UserError for invalid values.

    Its repr is part of the fingerprints in existing journals: a new name or field invalidates them.
    """

    prompt: str = DEFAULT_PROMPT
    frame_sampling: FrameSampling = "auto"
    template: Literal["auto"] | Template = "auto"
    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_length("prompt", self.prompt)
        if not self.prompt.strip():
            raise UserError(f"prompt is empty; ask something, such as {DEFAULT_PROMPT!r}")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise UserError("prompt is not valid UTF-8")
        _check_choice("frame_sampling", self.frame_sampling, get_args(FrameSampling))
        _check_choice("template", self.template, ("auto", *get_args(Template)))
        _check_range("max_new_tokens", self.max_new_tokens, 1, 2048)
        _check_range("temperature", self.temperature, 0, 5)
        _check_range("top_p", self.top_p, 0.01, 1)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRequest:
    """What to do with the clips of a data set. Raises UserError for invalid values."""

    settings: CaptionSettings
    trigger_word: str = ""
    caption_prefix: str = ""
    caption_suffix: str = ""
    existing_captions: Literal["keep", "replace"] = "keep"
    include_videos: bool = True
    batch_size: int = 8
    on_bad_clip: Literal["skip", "stop"] = "skip"

    def __post_init__(self) -> None:
        for name in ("trigger_word", "caption_prefix", "caption_suffix"):
            check_length(name, getattr(self, name))
        _check_choice("existing_captions", self.existing_captions, ("keep", "replace"))
        _check_choice("on_bad_clip", self.on_bad_clip, ("skip", "stop"))
        _check_range("batch_size", self.batch_size, 1, MAX_BATCH)

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> "DatasetRequest":
        """Return the request for the inputs of predict_caption_dataset.py, without input_videos."""
        names = {field.name for field in fields(CaptionSettings)}
        settings = CaptionSettings(**{name: value for name, value in inputs.items() if name in names})
        return cls(settings=settings, **{name: value for name, value in inputs.items() if name not in names})

    @property
    def replaces_captions(self) -> bool:
        """Return whether clips with a caption are captioned too."""
        return self.existing_captions == "replace"

    @property
    def stops_at_bad_clip(self) -> bool:
        """Return whether one unusable clip ends the run."""
        return self.on_bad_clip == "stop"

    def full_caption(self, caption: str) -> str:
        """Return a new caption with prefix, trigger word and suffix."""
        return full_caption(
            caption,
            trigger_word=self.trigger_word,
            caption_prefix=self.caption_prefix,
            caption_suffix=self.caption_suffix,
        )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value} is unknown; allowed are {', '.join(allowed)}")


def _check_range(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise UserError(f"{name}={value} is out of range: {lowest} to {highest}")
