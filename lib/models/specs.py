"""What exists: one ModelSpec per checkpoint. lib/models/derive.py makes one for any other folder."""

from dataclasses import dataclass
from typing import Literal

from lib.errors import UserError

VideoTask = Literal["t2v", "i2v"]
Task = VideoTask | Literal["caption"]
TASK_NAMES = {"t2v": "text-to-video", "i2v": "image-to-video", "caption": "captioning"}
MODEL_CLASSES = {
    "CogVideoXPipeline": "t2v",
    "CogVideoXImageToVideoPipeline": "i2v",
    "CogVLMVideoForCausalLM": "caption",
}
"""What model_index.json and config.json call them."""

SizeRule = Literal["fixed", "trained", "short side"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How many of a request's steps are computed; lib/generation/step_cache.py forecasts the others."""

    computed: int
    """Of the spec's num_inference_steps."""
    first: int
    """Computed one after the other at the beginning; at least 2."""
    last: int
    """The same at the end; at least 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Facts about one checkpoint. Sizes are pixels, frames include the first, fps is the training rate."""

    name: str
    task: Task
    height: int
    width: int
    frames: int
    """Default length."""
    frame_step: int
    """Valid lengths are frame_step * N + 1, up to max_frames."""
    max_frames: int
    fps: int
    text_tokens: int
    """Prompt tokens the model was trained with; longer prompts are cut."""
    dtype: Literal["float16", "bfloat16", "float32"]
    """What the weights are meant to run in on a GPU."""
    size_rule: SizeRule = "trained"
    """fixed: the positions are learned, nothing else runs. trained: other sizes run, but only this one was
    trained. short side: the shorter side is fixed, the longer one free up to this size's."""
    size_step: int = 16
    """Width and height are multiples of this: VAE compression times patch size."""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    recommended_scheduler: Literal["default", "ddim", "dpm"] = "default"
    use_dynamic_cfg: bool = False
    """Whether the authors advise dynamic guidance, beside the scheduler above."""
    balanced: Pace = Pace(computed=32, first=6, last=1)
    """What speed=balanced computes. For released checkpoints chosen from published figures, not measured:
    between the 1.4 and 2.4 times of TeaCache's two settings on these very models."""
    fast: Pace = Pace(computed=22, first=5, last=1)
    """What speed=fast computes."""
    attention_width: int | None = None
    """Heads times head size. LoRAs tell by it what they were made for; None where no LoRA is loaded."""
    layers: int | None = None
    """Blocks of a released transformer."""
    scaling_factor: float | None = None
    """What the VAE's latents are multiplied by. No tensor says this or the next three: conversion asks here.
    None for models that nothing is converted to."""
    invert_scale_latents: bool = False
    """Whether an image's latents are divided by it instead."""
    snr_shift_scale: float = 1.0
    """Of the schedule of the noise."""
    rotary_positions: bool = True
    """Otherwise positions are sines and cosines, added once."""
    nominal_sample: int | None = None
    """sample_height and sample_width of its transformer config where they are not the clip's, in latents."""
    temporal_patch: int | None = None
    """Latent frames that a token of a released transformer spans; None for 1, without a dimension for it."""
    repository: str | None = None
    """Home on the Hugging Face Hub; weights/manifest.toml has the licence and where the files come from."""

    @property
    def pipeline_class(self) -> str:
        """What its model_index.json or config.json calls it."""
        return next(name for name, task in MODEL_CLASSES.items() if task == self.task)

    def check_frames(self, frames: int) -> None:
        """Raise UserError unless this model can make a clip of that many frames."""
        if self.frame_step < frames <= self.max_frames and (frames - 1) % self.frame_step == 0:
            return
        nearest = max(1, round((frames - 1) / self.frame_step))
        nearest = min(nearest, (self.max_frames - 1) // self.frame_step) * self.frame_step + 1
        raise UserError(
            f"num_frames={frames} is not possible with {self.name}: it makes {self.frame_step}N+1 frames, "
            f"from {self.frame_step + 1} to {self.max_frames}. The nearest is {nearest}; "
            f"empty means {self.frames}."
        )

    def check_size(self, width: int, height: int, *, any_size: bool = False) -> None:
        """Raise UserError unless this model makes videos of that size.

        any_size (COGVIDEOX_ANY_SIZE=1) also lets through untrained sizes that the model can compute.
        """
        nearest = self.nearest_size(width, height, any_size=any_size)
        if nearest == (width, height):
            return
        allowed = f"{self.width}x{self.height} only"
        if self.size_rule == "short side":
            allowed = (
                f"a shorter side of {self.height} and a longer side of {self.height} to {self.width} "
                f"in steps of {self.size_step}"
            )
        elif self.size_rule == "trained" and any_size:
            allowed = f"multiples of {self.size_step}"
        elif self.size_rule == "trained":
            allowed += ", the size it was trained at (COGVIDEOX_ANY_SIZE=1 at setup lifts this)"
        raise UserError(
            f"width={width}, height={height} is not possible with {self.name}: it takes {allowed}. "
            f"The nearest is width={nearest[0]}, height={nearest[1]}."
        )

    def nearest_size(self, width: int, height: int, *, any_size: bool = False) -> tuple[int, int]:
        """The valid (width, height) nearest to the given one; itself when valid."""
        if self.size_rule == "short side":
            short = self.height
            wide = width >= height
            ratio = max(width, height) / max(1, min(width, height))
            exact = min(width, height) == short
            long = max(width, height) if exact else short * ratio
            long = min(max(_round_to(long, self.size_step), short), self.width)
            return (long, short) if wide else (short, long)
        if self.size_rule == "trained" and any_size:
            return (
                max(self.size_step, _round_to(width, self.size_step)),
                max(self.size_step, _round_to(height, self.size_step)),
            )
        return self.width, self.height


def _round_to(value: float, step: int) -> int:
    return int(value / step + 0.5) * step


_FIRST = {
    "height": 480, "width": 720, "frames": 49, "frame_step": 8, "max_frames": 49, "fps": 8,
    "scaling_factor": 0.7,
}  # fmt: skip
_SECOND = {
    "height": 768, "width": 1360, "frames": 81, "frame_step": 16, "max_frames": 161, "fps": 16,
    "scaling_factor": 0.7, "temporal_patch": 2, "nominal_sample": 300,
}  # fmt: skip
_TINY = {"height": 48, "width": 64, "frames": 9, "frame_step": 8, "max_frames": 49, "fps": 8}
_TINY |= {"balanced": Pace(computed=26, first=4, last=1), "fast": Pace(computed=12, first=4, last=1)}
_CAPTION = {
    "frames": 24, "frame_step": 1, "max_frames": 24, "fps": 1, "text_tokens": 2048, "size_rule": "fixed"
}  # fmt: skip

RELEASED_TEXT_ENCODER = {
    "d_model": 4096, "num_layers": 24, "num_heads": 64, "d_kv": 64, "d_ff": 10240, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
"""Sizes of the encoder of T5 v1.1 XXL, which all released video models have."""
RELEASED_VAE = {
    "block_out_channels": (128, 256, 256, 512), "latent_channels": 16, "layers_per_block": 3,
    "temporal_compression_ratio": 4, "sample_height": 480, "sample_width": 720,
}  # fmt: skip
"""The same of the VAE."""

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="tiny-t2v",
            task="t2v",
            **_TINY,
            text_tokens=20,
            dtype="float16",
            attention_width=192,
            size_rule="fixed",
        ),
        ModelSpec(
            name="tiny-i2v",
            task="i2v",
            **_TINY,
            text_tokens=20,
            dtype="float16",
            attention_width=192,
            size_rule="fixed",
        ),
        ModelSpec(
            name="tiny-caption",
            task="caption",
            height=48,
            width=48,
            **_CAPTION,
            dtype="float32",
            size_step=8,
        ),
        ModelSpec(
            name="cogvideox-2b",
            task="t2v",
            **_FIRST | {"scaling_factor": 1.15258426},
            snr_shift_scale=3.0,
            rotary_positions=False,
            text_tokens=226,
            dtype="float16",
            attention_width=1920,
            layers=30,
            recommended_scheduler="ddim",
            repository="zai-org/CogVideoX-2b",
        ),
        ModelSpec(
            name="cogvideox-5b",
            task="t2v",
            **_FIRST,
            text_tokens=226,
            dtype="bfloat16",
            attention_width=3072,
            layers=42,
            recommended_scheduler="dpm",
            use_dynamic_cfg=True,
            repository="zai-org/CogVideoX-5b",
        ),
        ModelSpec(
            name="cogvideox-5b-i2v",
            task="i2v",
            **_FIRST,
            text_tokens=226,
            dtype="bfloat16",
            attention_width=3072,
            layers=42,
            size_rule="fixed",
            recommended_scheduler="dpm",
            use_dynamic_cfg=True,
            repository="zai-org/CogVideoX-5b-I2V",
        ),
        ModelSpec(
            name="cogvideox1.5-5b",
            task="t2v",
            **_SECOND,
            text_tokens=224,
            dtype="bfloat16",
            attention_width=3072,
            layers=42,
            recommended_scheduler="dpm",
            use_dynamic_cfg=True,
            repository="zai-org/CogVideoX1.5-5B",
        ),
        ModelSpec(
            name="cogvideox1.5-5b-i2v",
            task="i2v",
            **_SECOND,
            text_tokens=224,
            dtype="bfloat16",
            attention_width=3072,
            layers=42,
            size_rule="short side",
            invert_scale_latents=True,
            recommended_scheduler="dpm",
            use_dynamic_cfg=True,
            repository="zai-org/CogVideoX1.5-5B-I2V",
        ),
        ModelSpec(
            name="cogvlm2-caption",
            task="caption",
            height=224,
            width=224,
            **_CAPTION,
            dtype="bfloat16",
            size_step=14,
            repository="zai-org/cogvlm2-llama3-caption",
        ),
    )
}
DEFAULT_MODELS: dict[Task, str] = {"t2v": "tiny-t2v", "i2v": "tiny-i2v", "caption": "tiny-caption"}


def names_for(task: Task) -> list[str]:
    """Names of the known checkpoints that do this task."""
    return [name for name, spec in SPECS.items() if spec.task == task]


def check_task(name: str, found: Task, task: Task) -> None:
    """Raise UserError when a checkpoint is asked to do another's task."""
    if found != task:
        raise UserError(
            f"COGVIDEOX_MODEL={name} is a model for {TASK_NAMES[found]}; this predictor does "
            f"{TASK_NAMES[task]}. Models that do: {', '.join(names_for(task))}."
        )
