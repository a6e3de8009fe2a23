"""The properties of a request that determine its memory, and the stages of its work."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["text_encoding", "image_encoding", "denoising", "decoding"]
Adapted = Literal["none", "attention", "everything"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Size in pixels, frames, and what changes the work of a step."""

    width: int
    height: int
    frames: int
    guided: bool = True
    """Whether guidance above 1 doubles the batch."""
    adapted: Adapted = "none"
    """Which layers have a LoRA."""
