"""The known checkpoints: one ModelSpec each. lib/models/derive.py makes one for any other folder."""

from dataclasses import dataclass, replace
from typing import Literal

from lib.errors import UserError
from lib.settings import Dtype

VideoTask = Literal["t2v", "i2v"]
Task = VideoTask | Literal["caption"]
TASK_NAMES: dict[Task, str] = {"t2v": "text-to-video", "i2v": "image-to-video", "caption": "captioning"}
MODEL_CLASSES: dict[str, Task] = {
    "CogVideoXPipeline": "t2v",
    "CogVideoXImageToVideoPipeline": "i2v",
    "CogVLMVideoForCausalLM": "caption",
}
"""The class that model_index.json or config.json names -> task."""

SizeRule = Literal["fixed", "trained", "short side"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSchedule:
    """How many of a request's steps are computed; lib/generation/step_cache.py forecasts the others."""

    computed: int
    """How many of the spec's num_inference_steps are computed."""
    first: int
    """Computed one after the other at the beginning; at least 2."""
    last: int
    """Computed one after the other at the end; at least 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Facts about one checkpoint. Sizes are pixels, frames include the first, fps is the training rate."""

    name: str
    task: Task
    height: int
    width: int
    frames: int
    """Default number of frames."""
    frame_step: int
    """Valid lengths are frame_step * N + 1, up to max_frames."""
    max_frames: int
    fps: int
    text_tokens: int
    """Prompt tokens the model was trained with; longer prompts are cut."""
    dtype: Dtype
    """The type that the weights are meant to be used in on a GPU."""
    size_rule: SizeRule = "trained"
    """fixed: positions are learned, no other size works. trained: other sizes work, but only this one was
    trained. short side: the shorter side is fixed, the longer one may have any length up to this size's."""
    size_step: int = 16
    """Width and height are multiples of this: VAE compression times patch size."""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    recommended_scheduler: Literal["default", "ddim", "dpm"] = "default"
    use_dynamic_cfg: bool = False
    """Whether the authors advise dynamic guidance with the scheduler above."""
    balanced: StepSchedule = StepSchedule(computed=32, first=6, last=1)
    """Steps computed with speed=balanced. For released checkpoints not measured, but chosen from published
    figures: TeaCache's two settings make these models 1.4 and 2.4 times as fast."""
    fast: StepSchedule = StepSchedule(computed=22, first=5, last=1)
    """Steps computed with speed=fast."""
    attention_width: int | None = None
    """Heads times head size, by which a LoRA's base model is recognized; None where no LoRA can be loaded."""
    layers: int | None = None
    """Transformer blocks of a released model."""
    scaling_factor: float | None = None
    """Factor of the VAE's latents. Conversion takes this and the next three values from here, since they
    cannot be read from tensors. None for models that are not a target of conversion."""
    invert_scale_latents: bool = False
    """Whether an image's latents are divided by the factor instead of multiplied."""
    snr_shift_scale: float = 1.0
    """Parameter of the noise schedule."""
    rotary_positions: bool = True
    """Rotary position embeddings; otherwise sinusoidal ones, added once."""
    nominal_sample: int | None = None
    """sample_height and sample_width of its transformer config where they are not the clip's, in latents."""
    temporal_patch: int | None = None
    """Latent frames per token (patch_size_t) of a released transformer; None where it has no such setting."""
    repository: str | None = None
    """Repository on the Hugging Face Hub; weights/manifest.toml has the licence and the download."""

    @property
    def pipeline_class(self) -> str:
        """Return the class that its model_index.json or config.json names."""
        return next(name for name, task in MODEL_CLASSES.items() if task == self.task)

    def check_frames(self, frames: int) -> None:
        """Raise UserError unless this model supports clips of that many frames."""
        if self.frame_step < frames <= self.max_frames and (frames - 1) % self.frame_step == 0:
            return
        nearest = max(1, round((frames - 1) / self.frame_step))
        nearest = min(nearest, (self.max_frames - 1) // self.frame_step) * self.frame_step + 1
        raise UserError(
            f"num_frames={frames} is not supported by {self.name}: use {self.frame_step}N+1 frames, from "
            f"{self.frame_step + 1} to {self.max_frames} (nearest: {nearest}); empty means {self.frames}."
        )

    def check_size(self, width: int, height: int, *, any_size: bool = False) -> None:
        """Raise UserError unless this model supports that size.

        `any_size` (COGVIDEOX_ANY_SIZE=1) also allows untrained sizes that the model can compute.
        """
        nearest = self.nearest_size(width, height, any_size=any_size)
        if nearest == (width, height):
            return
        allowed = f"{self.width}x{self.height} only"
        if self.size_rule == "short side":
            allowed = (
                f"a shorter side of {self.height} and a longer side from {self.height} to {self.width} "
                f"in steps of {self.size_step}"
            )
        elif self.size_rule == "trained" and any_size:
            allowed = f"multiples of {self.size_step}"
        elif self.size_rule == "trained":
            allowed += ", the size it was trained at, or set COGVIDEOX_ANY_SIZE=1 at setup"
        raise UserError(
            f"width={width}, height={height} is not supported by {self.name}: use {allowed} "
            f"(nearest: width={nearest[0]}, height={nearest[1]})."
        )

    def nearest_size(self, width: int, height: int, *, any_size: bool = False) -> tuple[int, int]:
        """Return the valid (width, height) nearest to the given one, which is itself if valid."""
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


RELEASED_TEXT_ENCODER = {
    "d_model": 4096, "num_layers": 24, "num_heads": 64, "d_kv": 64, "d_ff": 10240, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
"""Sizes of T5 v1.1 XXL's encoder, which all released video models have."""
RELEASED_VAE = {
    "block_out_channels": (128, 256, 256, 512), "latent_channels": 16, "layers_per_block": 3,
    "temporal_compression_ratio": 4, "sample_height": 480, "sample_width": 720,
}  # fmt: skip
"""Sizes of the VAE, which all released video models have."""

_TINY = ModelSpec(
    name="tiny-t2v",
    task="t2v",
    height=48,
    width=64,
    frames=9,
    frame_step=8,
    max_frames=49,
    fps=8,
    text_tokens=20,
    dtype="float16",
    size_rule="fixed",
    balanced=StepSchedule(computed=26, first=4, last=1),
    fast=StepSchedule(computed=12, first=4, last=1),
    attention_width=192,
)
_COGVIDEOX = ModelSpec(
    name="cogvideox-5b",
    task="t2v",
    height=480,
    width=720,
    frames=49,
    frame_step=8,
    max_frames=49,
    fps=8,
    text_tokens=226,
    dtype="bfloat16",
    recommended_scheduler="dpm",
    use_dynamic_cfg=True,
    attention_width=3072,
    layers=42,
    scaling_factor=0.7,
    repository="zai-org/CogVideoX-5b",
)
_COGVIDEOX_15 = replace(
    _COGVIDEOX,
    name="cogvideox1.5-5b",
    height=768,
    width=1360,
    frames=81,
    frame_step=16,
    max_frames=161,
    fps=16,
    text_tokens=224,
    temporal_patch=2,
    nominal_sample=300,
    repository="zai-org/CogVideoX1.5-5B",
)
_CAPTION = ModelSpec(
    name="cogvlm2-caption",
    task="caption",
    height=224,
    width=224,
    frames=24,
    frame_step=1,
    max_frames=24,
    fps=1,
    text_tokens=2048,
    dtype="bfloat16",
    size_rule="fixed",
    size_step=14,
    repository="zai-org/cogvlm2-llama3-caption",
)

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _TINY,
        replace(_TINY, name="tiny-i2v", task="i2v"),
        replace(
            _CAPTION,
            name="tiny-caption",
            height=48,
            width=48,
            dtype="float32",
            size_step=8,
            repository=None,
        ),
        replace(
            _COGVIDEOX,
            name="cogvideox-2b",
            dtype="float16",
            recommended_scheduler="ddim",
            use_dynamic_cfg=False,
            attention_width=1920,
            layers=30,
            scaling_factor=1.15258426,
            snr_shift_scale=3.0,
            rotary_positions=False,
            repository="zai-org/CogVideoX-2b",
        ),
        _COGVIDEOX,
        replace(
            _COGVIDEOX,
            name="cogvideox-5b-i2v",
            task="i2v",
            size_rule="fixed",
            repository="zai-org/CogVideoX-5b-I2V",
        ),
        _COGVIDEOX_15,
        replace(
            _COGVIDEOX_15,
            name="cogvideox1.5-5b-i2v",
            task="i2v",
            size_rule="short side",
            invert_scale_latents=True,
            repository="zai-org/CogVideoX1.5-5B-I2V",
        ),
        _CAPTION,
    )
}
DEFAULT_MODELS: dict[Task, str] = {"t2v": "tiny-t2v", "i2v": "tiny-i2v", "caption": "tiny-caption"}
"""The embedded model of each task."""


def names_for(task: Task) -> list[str]:
    """Return the names of the known checkpoints for a task."""
    return [name for name, spec in SPECS.items() if spec.task == task]


def check_task(name: str, found: Task, task: Task) -> None:
    """Raise UserError when a checkpoint is for another task."""
    if found != task:
        raise UserError(
            f"COGVIDEOX_MODEL={name} is a model for {TASK_NAMES[found]}; this predictor does "
            f"{TASK_NAMES[task]}. Models that do: {', '.join(names_for(task))}."
        )
