"""Video files -> captions: settings checked at the door, clips read frame by frame, described in batches."""

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from lib.cancellation import check_stop
from lib.caption.config import read_config
from lib.caption.model import CaptionModel, Decoding
from lib.caption.preprocessing import clip_pixel_values
from lib.caption.prompt import Template, build_prompt
from lib.caption.sampling import FrameSampling, choose_frames
from lib.errors import UserError
from lib.video.reader import open_video

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_PROMPT = "Please describe this video in detail."
DECODING_SECONDS = 120.0
"""How long a file may keep the decoder busy."""
MAX_PROMPT_TOKENS = 2048
MAX_RATIO = 50
"""Of a frame's sides: scaled by the shorter one, a narrower frame would fill the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSettings:
    """What is asked about clips, and how answers are made. Raises UserError for what is not allowed."""

    prompt: str = DEFAULT_PROMPT
    frame_sampling: FrameSampling = "auto"
    template: Literal["auto", "chat", "base", "vqa"] = "auto"
    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError(f"prompt is empty; ask something, such as {DEFAULT_PROMPT!r}")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise UserError("prompt has bytes that are no text; send it in UTF-8")
        for name, allowed in (
            ("frame_sampling", get_args(FrameSampling)),
            ("template", ("auto", *get_args(Template))),
        ):
            if (given := getattr(self, name)) not in allowed:
                raise UserError(f"{name}={given} is unknown; allowed are {', '.join(allowed)}")
        for name, lowest, highest in (
            ("max_new_tokens", 1, 2048),
            ("temperature", 0, 5),
            ("top_p", 0.01, 1),
        ):
            if not lowest <= (given := getattr(self, name)) <= highest:
                raise UserError(f"{name}={given} is out of range: {lowest} to {highest}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} is out of range: 0 to {2**63 - 1}")

    @property
    def decoding(self) -> Decoding:
        return Decoding(
            max_new_tokens=self.max_new_tokens,
            temperature=float(
                self.temperature
            ),  # a request may give whole numbers, which transformers refuses
            top_p=float(self.top_p),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampledClip:
    """The frames of a clip that the model is to see."""

    pixel_values: torch.Tensor
    """float32 [T, 3, S, S]."""
    sampling: Literal["chat", "base", "uniform"]
    seconds: float
    """Length of the whole clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """What the model says about a clip."""

    text: str
    tokens: int
    """Generated, the end token not counted."""
    finished: bool
    """False where max_new_tokens cut it off."""


def sample_clip(
    path: Path, *, sampling: FrameSampling, size: int, stop: threading.Event | None = None
) -> SampledClip:
    """Read the frames of a video file that `sampling` chooses, scaled to `size`, a few at a time.

    Raises UserError for a file that is no video, is damaged, or takes too long; Stopped.
    """
    with open_video(path, timeout=DECODING_SECONDS, stop=stop) as video:
        info = video.info
        if max(info.width, info.height) > MAX_RATIO * min(info.width, info.height):
            raise UserError(
                f"video {Path(path).name} is {info.width}x{info.height}: "
                f"its longer side may be {MAX_RATIO} times its shorter one"
            )
        chosen, used = choose_frames(
            video.timestamps, fps=info.fps, duration=info.duration, sampling=sampling
        )
        frames = clip_pixel_values(video.read(chosen), size)
    return SampledClip(pixel_values=frames, sampling=used, seconds=info.duration)


class Captioner:
    """A loaded model with its tokenizer."""

    def __init__(self, model: CaptionModel, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def frame_size(self) -> int:
        """Side in pixels of the frames that the model sees."""
        return self.model.config.vision_config.image_size

    def sample(
        self, path: Path, settings: CaptionSettings, *, stop: threading.Event | None = None
    ) -> SampledClip:
        """As sample_clip, at this model's size."""
        return sample_clip(path, sampling=settings.frame_sampling, size=self.frame_size, stop=stop)

    def check(self, settings: CaptionSettings) -> None:
        """Raise UserError where the prompt is longer than the model reads."""
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
        """Describe clips together, however many frames each has.

        At temperature 0 captions do not depend on what else is in the batch (in float32); above it they are
        drawn from the seed, for the batch as a whole. Raises Stopped.
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
                settings.decoding,
                on_token=on_token,
                stop=stop,
            )
        return [
            Caption(
                text=self.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                tokens=len(ids),
                finished=len(ids) < settings.max_new_tokens,
            )
            for ids in answers
        ]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def load_captioner(
    folder: Path, *, device: str, dtype: torch.dtype, quantization: str | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Captioner:  # fmt: skip
    """The captioner in a model's folder.

    Raises UserError when the folder is none or not whole, or its tokenizer is another model's.
    """
    from lib.caption.checkpoint import load_model

    tokenizer, words = load_tokenizer(folder), read_config(folder).vocab_size
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= words:
        raise UserError(
            f"{folder.name}: its tokenizer.json has token {highest}, but its model knows {words} tokens only."
        )
    return Captioner(
        load_model(folder, device=device, dtype=dtype, quantization=quantization, report=report), tokenizer
    )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in a model's folder, from tokenizer.json alone: no class named there is looked for."""
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder.name} has no tokenizer.json; captioning needs one.")
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:  # of the tokenizers library, which has no class of its own for it
        raise UserError(f"{folder.name}: its tokenizer.json cannot be read: {error}") from error


def _template(settings: CaptionSettings, clip: SampledClip) -> Template:
    if settings.template != "auto":
        return settings.template
    return "chat" if clip.sampling == "chat" else "base"
