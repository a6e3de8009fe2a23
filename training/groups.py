"""The settings of a training run in groups: their meaning, bounds and defaults.

The names are those of CogVideo's own trainer where it has the setting. The docstring under a field is the
description of the input in training/train.py, which `python -m training.signature` writes from this file.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from lib.errors import UserError, cut, shown
from lib.text_limits import NAME, PROMPT, PROMPTS

MAX_SEED = 2**63 - 1
Role = Literal["value", "file", "path", "secret"]
"""A file is uploaded with a request; a path may name a place on this machine. Only values are recorded."""


def setting(
    default: Any,
    *,
    ge: float | None = None,
    le: float | None = None,
    max_length: int = NAME,
    role: Role = "value",
) -> Any:
    """Declare a field with its bounds; choices are those of its Literal type."""
    bounds = {"ge": ge, "le": le, "max_length": max_length}
    return dataclasses.field(default=default, metadata=bounds | {"role": role})


def require(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which clips and captions are trained on, and how clips become samples."""

    input_videos: str | None = setting(None, role="file")
    """Zip or tar of video clips, each with a .txt caption of the same name (or metadata.jsonl, metadata.csv,
    or prompts.txt and videos.txt)."""
    dataset_name: str = setting("")
    """In place of input_videos: a Hugging Face dataset, owner/name or owner/name@revision."""
    video_column: str = setting("")
    """Column of metadata.jsonl or .csv with the clips' paths; empty: the usual names are tried."""
    caption_column: str = setting("")
    """Column with the captions; empty: the usual names are tried."""
    trigger_word: str = setting("", max_length=PROMPT)
    """Put before every caption that does not contain it."""
    caption_prefix: str = setting("", max_length=PROMPT)
    """Put before every caption, in front of the trigger word."""
    caption_suffix: str = setting("", max_length=PROMPT)
    """Put after every caption."""
    autocaption: bool = setting(False)
    """Let a captioning model describe the clips that have no caption, before anything else is computed."""
    autocaption_prompt: str = setting("", max_length=PROMPT)
    """Prompt for the captioning model; empty: describe the clip in detail."""
    autocaption_model: str = setting("", role="path")
    """Its name or Hub repository; empty: cogvlm2-caption, or tiny-caption for an embedded base."""
    fps: int | None = setting(None, ge=1, le=60)
    """Clips are resampled to this rate, by default the base's; another rate changes the learned speed."""
    max_num_frames: int | None = setting(None, ge=5, le=1000)
    """Longest sample in frames, by default the base's length; shorter clips give shorter samples."""
    height: int | None = setting(None, ge=16, le=4096)
    """Height of the samples, by default the base's."""
    width: int | None = setting(None, ge=16, le=4096)
    """Width of the samples, by default the base's."""
    skip_frames_start: int = setting(0, ge=0, le=100_000)
    """Frames of each file that are left out at its beginning."""
    skip_frames_end: int = setting(0, ge=0, le=100_000)
    """Frames of each file that are left out at its end."""
    video_reshape_mode: Literal["center", "random", "none"] = setting("center")
    """center: fill the frame, cut both sides equally. random: cut at random. none: keep all, black bars."""
    random_crops: int = setting(4, ge=1, le=64)
    """With video_reshape_mode random: how many crops of each sample are encoded and drawn from."""
    random_flip: float = setting(0.0, ge=0, le=1)
    """Probability that a sample is mirrored; both sides are encoded."""
    long_clips: Literal["split", "cut"] = setting("split")
    """A clip longer than a sample: split it into several, or cut it after the first."""
    on_bad_clip: Literal["skip", "stop"] = setting("skip")
    """Clips that cannot be used: skip them, or stop and list them all."""

    def __post_init__(self) -> None:
        require(
            "://" not in (self.input_videos or ""),
            f"input_videos={cut(self.input_videos)} is an address: give a folder, zip or tar on this machine "
            "or dataset_name for a data set of the Hugging Face Hub.",
        )
        require(
            (self.input_videos is None) != (not self.dataset_name),
            "give the clips with input_videos (an archive or folder) or dataset_name, one of the two.",
        )
        require(
            self.autocaption or not (self.autocaption_prompt or self.autocaption_model),
            "autocaption_prompt and autocaption_model need autocaption=true.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """The LoRA's shape."""

    rank: int = setting(128, ge=1, le=1024)
    """Rank of the LoRA matrices."""
    lora_alpha: float | None = setting(None, ge=1e-4, le=8192)
    """The update is scaled by lora_alpha / rank; by default the rank, which every loader assumes."""
    target_modules: str = setting("to_q,to_k,to_v,to_out.0")
    """Linear layers of the transformer that get LoRA matrices, by the end of their names."""

    def __post_init__(self) -> None:
        require(bool(self.targets), "target_modules is empty; the default is to_q,to_k,to_v,to_out.0.")

    @property
    def alpha(self) -> float:
        """lora_alpha, or the rank."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def targets(self) -> list[str]:
        """target_modules as a list."""
        return parts(self.target_modules, ",")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How long, in which batches and at which learning rate it trains."""

    max_train_steps: int | None = setting(None, ge=1, le=1_000_000)
    """Optimizer steps in all, those before a resume included; 1500 where num_train_epochs is empty too."""
    num_train_epochs: int | None = setting(None, ge=1, le=100_000)
    """In place of max_train_steps: passes over the samples."""
    train_batch_size: int = setting(1, ge=1, le=1024)
    """Samples per batch on each device."""
    gradient_accumulation_steps: int = setting(1, ge=1, le=1024)
    """Batches whose gradients make one optimizer step."""
    learning_rate: float = setting(1e-4, ge=0, le=10)
    """Peak of the schedule. For prodigy give 1."""
    scale_lr: bool = setting(False)
    """Multiply the learning rate by devices x accumulation x batch size."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = setting("constant")
    """Shape of the learning rate over the steps."""
    lr_warmup_steps: int | None = setting(None, ge=0, le=1_000_000)
    """Steps in which the rate rises from 0; by default a tenth of all, at most 500. Not for constant."""
    lr_num_cycles: int = setting(1, ge=1, le=1000)
    """Restarts of cosine_with_restarts."""
    lr_power: float = setting(1.0, ge=0, le=100)
    """Power of polynomial."""
    optimizer: Literal["adam", "adamw", "adam_8bit", "adamw_8bit", "prodigy"] = setting("adam")
    """The 8-bit ones need an NVIDIA GPU and bitsandbytes, prodigy needs prodigyopt."""
    adam_beta1: float = setting(0.9, ge=0, le=0.9999)
    """Decay of the gradient's running mean; also prodigy's."""
    adam_beta2: float = setting(0.95, ge=0, le=0.999999)
    """Decay of the squared gradient's running mean; also prodigy's."""
    adam_weight_decay: float = setting(1e-4, ge=0, le=10)
    """Decoupled in adamw, part of the gradient in adam; also prodigy's."""
    adam_epsilon: float = setting(1e-8, ge=1e-16, le=1)
    """Added to the denominator; also prodigy's."""
    prodigy_beta3: float | None = setting(None, ge=0, le=0.999999)
    """Decay of prodigy's step size estimate; by default the square root of beta2."""
    prodigy_decouple: bool = setting(True)
    """Weight decay as in adamw."""
    prodigy_use_bias_correction: bool = setting(True)
    """Adam's bias correction in prodigy."""
    prodigy_safeguard_warmup: bool = setting(True)
    """Keep the warm-up's small rates out of prodigy's estimate."""
    max_grad_norm: float = setting(1.0, ge=0, le=1000)
    """Gradients are scaled down to this norm; 0 leaves them as they are."""

    def __post_init__(self) -> None:
        require(
            self.max_train_steps is None or self.num_train_epochs is None,
            f"max_train_steps={self.max_train_steps} and num_train_epochs={self.num_train_epochs} exclude "
            "each other; give one.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RegularizationConfig:
    """Dropout of conditions, and preservation of what the base knows."""

    noised_image_dropout: float = setting(0.05, ge=0, le=1)
    """Share of samples whose image condition is zero; image to video only."""
    caption_dropout: float = setting(0.1, ge=0, le=1)
    """Share of samples trained with an empty caption, for classifier-free guidance."""
    prior_preservation: float = setting(0.0, ge=0, le=0.9)
    """Share of samples that preserve what the base knows: with one of prior_prompts, the LoRA learns to
    predict what the base predicts. Needs no additional clips."""
    prior_prompts: str = setting("", max_length=PROMPTS)
    """Prompts for prior_preservation, separated by validation_prompt_separator; by default the empty
    prompt."""

    def __post_init__(self) -> None:
        require(
            not self.prior_prompts or self.prior_preservation > 0,
            "prior_prompts need prior_preservation, the share of samples that they are for.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """Memory, precision, the seed, and the timeout between processes."""

    gradient_checkpointing: bool | None = setting(None)
    """Recompute activations in the backward pass: far less memory, a third more work. By default only on a
    GPU."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting("auto")
    """Type that the base computes in; the LoRA matrices are always float32. auto: bf16 on a GPU that supports
    it, fp16 on an older one, no on a CPU."""
    base_precision: Literal["auto", "fp8"] = setting("auto")
    """fp8: keep the frozen base's linear layers in 8 bits, half the memory, and compute as before."""
    allow_tf32: bool = setting(False)
    """TF32 for float32 products on an NVIDIA GPU."""
    enable_slicing: bool = setting(False)
    """Decode validation clips one after the other."""
    enable_tiling: bool = setting(False)
    """Encode and decode in tiles: less memory, slightly different latents."""
    seed: int | None = setting(None, ge=0, le=MAX_SEED)
    """The same seed, settings and clips give the same losses. Empty: a random seed, recorded in the model
    card."""
    nccl_timeout: int = setting(600, ge=1, le=86_400)
    """Seconds that one process of several waits for the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointsConfig:
    """When checkpoints are written, and what a run resumes from."""

    checkpointing_steps: int = setting(500, ge=1, le=1_000_000)
    """Steps between checkpoints; a killed run loses at most the steps since its last checkpoint."""
    checkpoints_total_limit: int = setting(3, ge=1, le=1000)
    """How many of the newest checkpoints are kept."""
    resume_from: str = setting("", role="path")
    """URL of an earlier output (tar) to resume from; exactly, optimizer included, if it was made with
    save_training_state."""
    save_training_state: bool = setting(False)
    """Put the last checkpoint, optimizer included, into the output, so that resume_from continues exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Clips that are made during training."""

    validation_prompt: str = setting("", max_length=PROMPTS)
    """Prompt of clips made during training; several are separated by validation_prompt_separator."""
    validation_images: tuple[str, ...] = setting((), role="file")
    """First frame of each prompt's clips; image to video only."""
    validation_prompt_separator: str = setting(":::")
    """Text that separates several validation prompts."""
    num_validation_videos: int = setting(1, ge=1, le=16)
    """Clips of each prompt, each with a seed of its own."""
    validation_steps: int = setting(500, ge=1, le=1_000_000)
    """Steps between validation clips, which are also made at the end."""
    validation_inference_steps: int = setting(50, ge=1, le=500)
    """Denoising steps of validation clips."""
    guidance_scale: float = setting(6.0, ge=1, le=20)
    """Guidance of validation clips."""
    use_dynamic_cfg: bool = setting(False)
    """Dynamic guidance in validation clips."""

    def __post_init__(self) -> None:
        require(bool(self.validation_prompt_separator), "validation_prompt_separator is empty.")
        require(
            not self.validation_images or bool(self.prompts),
            "validation_images need a validation_prompt each.",
        )

    @property
    def prompts(self) -> list[str]:
        """validation_prompt as a list."""
        return parts(self.validation_prompt, self.validation_prompt_separator)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishingConfig:
    """Trackers and the Hugging Face Hub."""

    report_to: Literal["none", "tensorboard", "wandb", "all"] = setting("none")
    """Trackers that receive loss, learning rate and validation clips."""
    tracker_name: str = setting("cogvideox-lora")
    """Project in the tracker."""
    wandb_api_key: str = setting("", role="secret")
    """Key for report_to wandb."""
    hub_model_id: str = setting("")
    """Hugging Face repository (owner/name) that receives the result; created, as private, if it does not
    exist."""
    hub_token: str = setting("", role="secret")
    """Hugging Face token with write access, for hub_model_id."""
    push_checkpoints: bool = setting(False)
    """Also upload each checkpoint as it is made, under checkpoints/."""

    def __post_init__(self) -> None:
        require(
            not self.push_checkpoints or bool(self.hub_model_id),
            "push_checkpoints needs hub_model_id, the repository that receives them.",
        )
        require(
            re.fullmatch(r"[\w-][\w.-]*", self.tracker_name, re.ASCII) is not None,  # it names a folder
            f"tracker_name={shown(self.tracker_name)} is not a plain name of letters, digits, '.', '_' and "
            "'-'.",
        )
        require(
            not self.hub_model_id or re.fullmatch(r"[^/]+/[^/]+", self.hub_model_id) is not None,
            f"hub_model_id={shown(self.hub_model_id)} is not owner/name.",
        )

    @property
    def trackers(self) -> list[str]:
        """The trackers by name."""
        return {"none": [], "all": ["tensorboard", "wandb"]}.get(self.report_to, [self.report_to])


def parts(text: str, separator: str) -> list[str]:
    """Split a text at a separator, without blanks and empty parts."""
    return [part.strip() for part in text.split(separator) if part.strip()]
