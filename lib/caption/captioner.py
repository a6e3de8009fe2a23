"""Video files to captions: frames are read one by one, and clips described in batches."""

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerFast

from lib.cancellation import check_stop
from lib.caption.checkpoint import load_model
from lib.caption.config import read_config
from lib.caption.inputs import build_prompt, choose_frames, clip_pixel_values
from lib.caption.model import CaptionModel
from lib.caption.precision import Quantization
from lib.caption.request import CaptionSettings, FrameSampling, Template
from lib.errors import UserError
from lib.video.reader import OpenVideo

MAX_PROMPT_TOKENS = 2048
MAX_ASPECT_RATIO = 50
"""Largest aspect ratio: the scaled frame of a narrower clip would be too large for memory."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledClip:
    """The frames of a clip that the model sees."""

    pixel_values: torch.Tensor
    """float32 [T, 3, S, S]."""
    sampling: Literal["chat", "base", "uniform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """The model's answer about a clip."""

    text: str
    tokens: int
    """Generated tokens without the end token."""
    finished: bool
    """False where max_new_tokens cut it off."""


def sample_clip(video: OpenVideo, *, sampling: FrameSampling, size: int) -> SampledClip:
    """Read the frames that `sampling` selects, scaled to `size`. Raises UserError as `video.read` does."""
    info = video.info
    if max(info.width, info.height) > MAX_ASPECT_RATIO * min(info.width, info.height):
        raise UserError(
            f"video {video.name} is {info.width}x{info.height}: "
            f"its longer side may be at most {MAX_ASPECT_RATIO} times its shorter side"
        )
    chosen, used = choose_frames(video.timestamps, fps=info.fps, duration=info.duration, sampling=sampling)
    return SampledClip(pixel_values=clip_pixel_values(video.read(chosen), size), sampling=used)


class Captioner:
    """A loaded model with its tokenizer."""

    def __init__(self, model: CaptionModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    def sample(self, video: OpenVideo, settings: CaptionSettings) -> SampledClip:
        """Read a clip's frames at the model's size; see sample_clip."""
        size = self.model.config.vision_config.image_size
        return sample_clip(video, sampling=settings.frame_sampling, size=size)

    def check(self, settings: CaptionSettings) -> None:
        """Raise UserError if the prompt has too many tokens."""
        count = len(self._encode(settings.prompt))
        if count > MAX_PROMPT_TOKENS:
            raise UserError(f"the prompt has {count} tokens; allowed are {MAX_PROMPT_TOKENS}")

    def caption(
        self,
        clips: list[SampledClip],
        settings: CaptionSettings,
        *,
        on_token: Callable[[int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> list[Caption]:
        """Describe clips, which may have different numbers of frames, in one batch.

        At temperature 0 and in float32, captions do not depend on the rest of the batch. Above 0 they are
        sampled from the seed for the batch. Raises Stopped.
        """
        check_stop(stop)
        config = self.model.config
        prompts = [
            build_prompt(
                settings.prompt,
                frames=len(clip.pixel_values),
                template=_template(settings, clip),
                tokens_per_frame=config.vision_config.tokens,
                bos=config.bos_token_id,
                pad=config.pad_token_id,
                encode=self._encode,
            )
            for clip in clips
        ]
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(secrets.randbits(63) if settings.seed is None else settings.seed)
            answers = self.model.generate(
                prompts,
                [clip.pixel_values for clip in clips],
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                on_token=on_token,
                stop=stop,
            )
        return [
            Caption(
                text=str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip(),
                tokens=len(ids),
                finished=len(ids) < settings.max_new_tokens,
            )
            for ids in answers
        ]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def load_captioner(
    folder: Path, *, device: str, dtype: torch.dtype, quantization: Quantization = "none"
) -> Captioner:
    """Load a model's folder.

    Raises UserError if the folder is not a complete captioning model, or its tokenizer does not fit.
    """
    tokenizer, vocab_size = load_tokenizer(folder), read_config(folder).vocab_size
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= vocab_size:
        raise UserError(
            f"{folder.name}: tokenizer.json has token {highest}, but the model's vocab_size is {vocab_size}."
        )
    return Captioner(load_model(folder, device=device, dtype=dtype, quantization=quantization), tokenizer)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load tokenizer.json of a model's folder; tokenizer classes named in its configs are ignored."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder.name} has no tokenizer.json; captioning needs one.")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"{folder.name}: tokenizer.json cannot be read: {error}") from error


def _template(settings: CaptionSettings, clip: SampledClip) -> Template:
    if settings.template != "auto":
        return settings.template
    return "chat" if clip.sampling == "chat" else "base"
