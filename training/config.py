"""Every setting of a training run: what it means, what it may be, and what is refused at the door.

The names are those of CogVideo's own trainer where it has the setting. training/train.py spells the same
inputs out for Cog; a test holds the two together.
"""

import dataclasses
import hashlib
import json
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lib.errors import UserError

SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("adam", "adamw", "adam_8bit", "adamw_8bit", "prodigy")
MAX_SEED = 2**63 - 1
DEFAULT_STEPS = 1500
MAX_WARMUP_STEPS = 500
SECRETS = ("hub_token", "wandb_api_key")


def setting(
    default: Any,
    *,
    ge: float | None = None,
    le: float | None = None,
    choices: tuple[str, ...] | None = None,
    fits: bool = False,
) -> Any:
    """A field with its bounds. `fits`: what a training state must share with a run that goes on."""
    return dataclasses.field(default=default, metadata={"ge": ge, "le": le, "choices": choices, "fits": fits})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The settings as given; None means "settled from the base and the machine" (see training/plan.py).

    Raises UserError naming the setting, what was given and what is allowed.
    """

    # Data
    input_videos: str | None = setting(None)
    """Folder, zip or tar of clips with captions."""
    dataset_name: str = setting("")
    """In place of input_videos: a Hugging Face dataset, owner/name or owner/name@revision."""
    video_column: str = setting("")
    """Column of metadata.jsonl or .csv with the clips' paths; empty: the usual names are looked for."""
    caption_column: str = setting("")
    """Column with the captions; empty: the usual names are looked for."""
    trigger_word: str = setting("")
    """Put before every caption that does not hold it."""
    caption_prefix: str = setting("")
    """Put before every caption, the trigger word included."""
    caption_suffix: str = setting("")
    """Put after every caption."""
    autocaption: bool = setting(False)
    """Let a captioning model describe the clips that have no caption, before anything else is computed."""
    autocaption_prompt: str = setting("")
    """What it is asked about each clip; empty: to describe it in detail."""
    autocaption_model: str = setting("")
    """Its name, folder or Hub repository; empty: cogvlm2-caption, beside an embedded base tiny-caption."""
    fps: int | None = setting(None, ge=1, le=60)
    """Clips are resampled to this rate, by default the base's: another one teaches another pace."""
    max_num_frames: int | None = setting(None, ge=5, le=1000)
    """Longest sample in frames, by default the base's length; shorter clips give shorter samples."""
    height: int | None = setting(None, ge=16, le=4096)
    """Of the samples, by default the base's."""
    width: int | None = setting(None, ge=16, le=4096)
    """Of the samples, by default the base's."""
    skip_frames_start: int = setting(0, ge=0, le=100_000)
    """Frames of each file that are left out at its beginning."""
    skip_frames_end: int = setting(0, ge=0, le=100_000)
    """Frames of each file that are left out at its end."""
    video_reshape_mode: Literal["center", "random", "none"] = setting(
        "center", choices=("center", "random", "none")
    )
    """center: fill the frame, cut both sides equally. random: cut at random. none: keep all, black bars."""
    random_crops: int = setting(4, ge=1, le=64)
    """With video_reshape_mode random: how many crops of each sample are encoded and drawn from."""
    random_flip: float = setting(0.0, ge=0, le=1)
    """Probability that a sample is mirrored; both sides are encoded."""
    long_clips: Literal["split", "cut"] = setting("split", choices=("split", "cut"))
    """A clip longer than a sample: split it into several, or cut it after the first."""
    on_bad_clip: Literal["skip", "stop"] = setting("skip", choices=("skip", "stop"))
    """A clip that cannot be used: train on the rest, or stop and list them all."""

    # LoRA
    rank: int = setting(128, ge=1, le=1024, fits=True)
    """Of the LoRA matrices."""
    lora_alpha: float | None = setting(None, ge=1e-4, le=8192, fits=True)
    """The update is scaled by lora_alpha / rank; by default the rank, which every loader assumes."""
    target_modules: str = setting("to_q,to_k,to_v,to_out.0", fits=True)
    """Linear layers of the transformer that get LoRA matrices, by the end of their names."""

    # Optimization
    max_train_steps: int | None = setting(None, ge=1, le=1_000_000)
    """Optimizer steps in all, those before a resume included; 1500 where num_train_epochs is empty too."""
    num_train_epochs: int | None = setting(None, ge=1, le=100_000)
    """In place of max_train_steps: passes over the samples."""
    train_batch_size: int = setting(1, ge=1, le=1024)
    """Samples a step on each device."""
    gradient_accumulation_steps: int = setting(1, ge=1, le=1024)
    """Batches whose gradients make one optimizer step."""
    learning_rate: float = setting(1e-4, ge=0, le=10)
    """Peak of the schedule. For prodigy give 1."""
    scale_lr: bool = setting(False)
    """Multiply the learning rate by devices x accumulation x batch size."""
    lr_scheduler: str = setting("constant", choices=SCHEDULERS)
    """Shape of the learning rate over the steps."""
    lr_warmup_steps: int | None = setting(None, ge=0, le=1_000_000)
    """Steps in which the rate rises from 0; by default a tenth of all, at most 500. Not for constant."""
    lr_num_cycles: int = setting(1, ge=1, le=1000)
    """Restarts of cosine_with_restarts."""
    lr_power: float = setting(1.0, ge=0, le=100)
    """Power of polynomial."""
    optimizer: str = setting("adam", choices=OPTIMIZERS, fits=True)
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
    """Decay of prodigy's step size estimate; by default the root of beta2."""
    prodigy_decouple: bool = setting(True)
    """Weight decay as in adamw."""
    prodigy_use_bias_correction: bool = setting(True)
    """Adam's bias correction in prodigy."""
    prodigy_safeguard_warmup: bool = setting(True)
    """Keep the warm-up's small rates out of prodigy's estimate."""
    max_grad_norm: float = setting(1.0, ge=0, le=1000)
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    noised_image_dropout: float = setting(0.05, ge=0, le=1)
    """Share of samples whose image condition is zero; image to video only."""
    caption_dropout: float = setting(0.1, ge=0, le=1)
    """Share of samples with the empty caption, which guidance compares with at prediction."""
    prior_preservation: float = setting(0.0, ge=0, le=0.9)
    """Share of samples that keep what the base knows: prompted by one of prior_prompts, the LoRA is to answer
    as the base does. Needs no other clips."""
    prior_prompts: str = setting("")
    """For prior_preservation, separated by validation_prompt_separator; without any, the empty prompt."""

    # Memory and precision
    gradient_checkpointing: bool | None = setting(None)
    """Compute activations again in the backward pass: far less memory, a third more work. By default on a
    GPU only."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = setting(
        "auto", choices=("auto", "no", "fp16", "bf16")
    )
    """What the base computes in; the LoRA matrices are float32 throughout. auto: bf16 on a GPU that has it,
    fp16 on an older one, no on a CPU."""
    base_precision: Literal["auto", "fp8"] = setting("auto", choices=("auto", "fp8"))
    """fp8: keep the frozen base's linear layers in 8 bits, half the memory, and compute as before."""
    allow_tf32: bool = setting(False)
    """TF32 for float32 products on an NVIDIA GPU."""
    enable_slicing: bool = setting(False)
    """Decode validation clips one after the other."""
    enable_tiling: bool = setting(False)
    """Encode and decode in tiles: less memory, slightly other latents."""
    seed: int | None = setting(None, ge=0, le=MAX_SEED)
    """Same seed, settings and clips, same losses. Empty: a random one, which the model card records."""

    # Checkpoints
    checkpointing_steps: int = setting(500, ge=1, le=1_000_000)
    """A checkpoint every so many steps; a kill loses at most the steps since the last."""
    checkpoints_total_limit: int = setting(3, ge=1, le=1000)
    """How many of the newest are kept."""
    resume_from: str = setting("")
    """An earlier output (tar) or a checkpoint to go on from. The same output_dir resumes by itself."""
    save_training_state: bool = setting(False)
    """Put the last checkpoint, optimizer included, into the output, so that resume_from can go on exactly."""

    # Validation
    validation_prompt: str = setting("")
    """Prompt of clips made during training; several are separated by validation_prompt_separator."""
    validation_images: tuple[str, ...] = setting(())
    """First frame of each prompt's clips; image to video only."""
    validation_prompt_separator: str = setting(":::")
    """Between several validation prompts."""
    num_validation_videos: int = setting(1, ge=1, le=16)
    """Clips of each prompt, each with a seed of its own."""
    validation_steps: int = setting(500, ge=1, le=1_000_000)
    """Clips are made every so many steps, and at the end."""
    validation_inference_steps: int = setting(50, ge=1, le=500)
    """Denoising steps of validation clips."""
    guidance_scale: float = setting(6.0, ge=1, le=20)
    """Guidance of validation clips."""
    use_dynamic_cfg: bool = setting(False)
    """Dynamic guidance in validation clips."""

    # Reporting
    report_to: Literal["none", "tensorboard", "wandb", "all"] = setting(
        "none", choices=("none", "tensorboard", "wandb", "all")
    )
    """Trackers that receive loss, learning rate and validation clips."""
    tracker_name: str = setting("cogvideox-lora")
    """Project in the tracker."""
    wandb_api_key: str = setting("")
    """A secret."""
    hub_model_id: str = setting("")
    """Hugging Face repository (owner/name) that receives the result; made, private, if it is not there."""
    hub_token: str = setting("")
    """A secret; needs write access. Empty: HF_TOKEN."""
    push_checkpoints: bool = setting(False)
    """Also upload each checkpoint as it is made, under checkpoints/."""
    nccl_timeout: int = setting(600, ge=1, le=86_400)
    """Seconds that one process of several waits for the others."""

    def __post_init__(self) -> None:
        for name, kind, field in _fields():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind, field.metadata))
        _require(
            (self.input_videos is None) != (not self.dataset_name),
            "give the clips with input_videos (an archive or folder) or dataset_name, one of the two",
        )
        _require(
            self.max_train_steps is None or self.num_train_epochs is None,
            f"max_train_steps={self.max_train_steps} and num_train_epochs={self.num_train_epochs} exclude "
            "each other; give one",
        )
        _require(bool(self.targets), "target_modules is empty; the default is to_q,to_k,to_v,to_out.0")
        _require(bool(self.validation_prompt_separator), "validation_prompt_separator is empty")
        _require(
            not self.validation_images or bool(self.validation_prompts),
            "validation_images need a validation_prompt each",
        )
        _require(
            not self.push_checkpoints or bool(self.hub_model_id),
            "push_checkpoints needs hub_model_id, the repository that receives them",
        )
        _require(
            not self.prior_prompts or self.prior_preservation > 0,
            "prior_prompts need prior_preservation, the share of samples that they are for",
        )
        _require(
            self.autocaption or not (self.autocaption_prompt or self.autocaption_model),
            "autocaption_prompt and autocaption_model need autocaption=true",
        )
        _require(
            re.fullmatch(r"[\w-][\w.-]*", self.tracker_name, re.ASCII) is not None,  # it names a folder
            f"tracker_name={self.tracker_name!r} is not a plain name of letters, digits, '.', '_' and '-'",
        )
        if self.hub_model_id:
            owner, slash, name = self.hub_model_id.partition("/")
            _require(
                bool(owner and slash and name) and "/" not in name,
                f"hub_model_id={self.hub_model_id!r} is not owner/name",
            )

    @property
    def alpha(self) -> float:
        """lora_alpha, or the rank."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def targets(self) -> list[str]:
        return [name for name in (part.strip() for part in self.target_modules.split(",")) if name]

    @property
    def validation_prompts(self) -> list[str]:
        parts = self.validation_prompt.split(self.validation_prompt_separator)
        return [part.strip() for part in parts if part.strip()]

    @property
    def prior_captions(self) -> list[str]:
        parts = self.prior_prompts.split(self.validation_prompt_separator)
        return [part.strip() for part in parts if part.strip()] or [""]

    def public(self) -> dict[str, Any]:
        """Every setting but secrets and this machine's paths, for records and model cards."""
        hidden = ("input_videos", "resume_from", "validation_images", "autocaption_model", *SECRETS)
        return {name: getattr(self, name) for name, _, _ in _fields() if name not in hidden}

    def fits(self) -> dict[str, Any]:
        """What a saved training state must have been made with to be continued under these settings."""
        found = {name: getattr(self, name) for name, _, field in _fields() if field.metadata["fits"]}
        return found | {"lora_alpha": self.alpha, "target_modules": ",".join(sorted(self.targets))}


def digest(content: Any) -> str:
    """A short stable name for anything that JSON can hold."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fields() -> Iterator[tuple[str, Any, dataclasses.Field]]:
    kinds = get_type_hints(TrainingConfig)
    for field in dataclasses.fields(TrainingConfig):
        yield field.name, kinds[field.name], field


def _checked(name: str, value: Any, kind: Any, limits: Any) -> Any:
    """The value in its field's type. JSON and Cog pass 9.0 for 9 and 1 for 1.0."""
    optional = get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)
    if optional:
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        kind = str
    if get_origin(kind) is tuple:
        _require(isinstance(value, (list, tuple)), f"{name}={value!r} is not a list")
        return tuple(str(item) for item in value)
    if kind in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wanted = "a whole number" if kind is int else "a number"
        whole = isinstance(value, int) or (number and value.is_integer())
        _require(number and (kind is float or whole), f"{name}={value!r} is not {wanted}")
        low, high = limits["ge"], limits["le"]
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            nearest = low if low is not None and not value >= low else high
            raise UserError(f"{name}={value} is out of range: {low} to {high}. The nearest is {nearest}.")
        return kind(value)
    _require(
        isinstance(value, kind), f"{name}={value!r} is not {'true or false' if kind is bool else 'text'}"
    )
    choices = limits["choices"]
    _require(
        choices is None or value in choices, f"{name}={value!r} is not one of {', '.join(choices or ())}"
    )
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message + ".")
