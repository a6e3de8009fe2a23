"""What a run does on this machine: settings resolved from base and device, and checked before any work."""

import importlib.util
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lib.caption.config import read_config
from lib.errors import UserError, shown
from lib.models import derive, specs
from lib.models.specs import ModelSpec, Task
from lib.network import hub
from lib.progress import Report, print_line
from lib.settings import current
from lib.weights import checkpoints
from training.clips import Sampling
from training.config import TrainingConfig
from training.groups import ComputeConfig, DataConfig, ValidationConfig

TRAINABLE: tuple[Task, ...] = ("i2v", "t2v")
CAPTIONER = "cogvlm2-caption"
"""The model that CogVideoX's own training captions were made with."""
LIBRARIES = {
    "adam_8bit": "bitsandbytes",
    "adamw_8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
Precision = Literal["no", "fp16", "bf16"]
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The base, and the settings that follow from it and from the machine."""

    spec: ModelSpec
    base: str
    """The base's name without a path of this machine."""
    folder: Path
    """The base's complete diffusers folder."""
    device: str
    precision: Precision
    """Type that the base computes in."""
    gradient_checkpointing: bool
    sampling: Sampling
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """The frozen weights' type. A CPU keeps float32: there 16 bits save little and are slower."""
        return torch.float32 if self.device == "cpu" else DTYPES[self.precision]

    @property
    def is_i2v(self) -> bool:
        """Whether the base starts from an image."""
        return self.spec.task == "i2v"


def base_name() -> str:
    """Return COGVIDEOX_MODEL, or the embedded image-to-video model."""
    return current().model or specs.DEFAULT_MODELS["i2v"]


def validate(config: TrainingConfig, name: str, device: str) -> None:
    """Check what can be checked before data or weights are touched.

    Raises UserError for a base or a captioner of the wrong kind, and for an optimizer, tracker or precision
    that this machine does not support.
    """
    if name in specs.SPECS:
        _check_base(name, specs.SPECS[name].task, config.validation)
        _check_shape(config.data, specs.SPECS[name])
    elif Path(name).expanduser().is_dir():  # of a repository only the task is known before the download
        resolve_plan(config, name, locate_base(name, config.validation, print_line), device)
    if config.data.autocaption:
        _validate_captioner(captioner_name(config.data, label(name)))
    _resolve_checkpointing(config.compute, device)
    optimizer, publishing = config.optimizer.optimizer, config.publishing
    if optimizer.endswith("_8bit") and device == "cpu":
        raise UserError(f"optimizer={optimizer} needs an NVIDIA GPU; on this CPU use {optimizer[:-5]}.")
    if config.compute.mixed_precision == "fp16" and device == "cpu":
        raise UserError("mixed_precision=fp16 needs a GPU; on this CPU use no or bf16.")
    for user in (optimizer, *publishing.trackers):
        library = LIBRARIES.get(user)
        if library and importlib.util.find_spec(library) is None:
            raise UserError(
                f"{user} needs the package {library}, which is not installed: pip install {library}"
            )
    if "wandb" in publishing.trackers and not (publishing.wandb_api_key or _wandb_is_set_up()):
        raise UserError(f"report_to={publishing.report_to} needs wandb_api_key (or WANDB_API_KEY).")


def locate_base(name: str, validation: ValidationConfig, report: Report) -> Path:
    """Return the base's folder, downloaded if need be; a repository's task is checked before the download."""
    return checkpoints.locate(
        name,
        check=lambda index: _check_base(name, derive.task_of(index, name), validation),
        report=report,
    )


def captioner_name(config: DataConfig, base: str) -> str:
    """Return the model that captions clips for a base: autocaption_model, or the base's default."""
    embedded = base in specs.DEFAULT_MODELS.values()
    return config.autocaption_model or (specs.DEFAULT_MODELS["caption"] if embedded else CAPTIONER)


def locate_captioner(name: str, report: Report) -> Path:
    """Return the captioner's folder, downloaded if need be. Raises UserError for another kind of model."""
    return checkpoints.locate(
        name, check=lambda index: _check_captioner(name, derive.task_of(index, name)), report=report
    )


def resolve_plan(config: TrainingConfig, name: str, folder: Path, device: str) -> Plan:
    """Return the plan for a base in `folder`.

    Raises UserError for sizes, lengths and models that do not fit.
    """
    data, spec = config.data, derive.spec_for(name, folder)
    _check_channels(name, spec, folder)
    _check_shape(data, spec)
    sampling = Sampling(
        fps=data.fps or spec.fps,
        frame_step=spec.frame_step,
        max_frames=data.max_num_frames or spec.frames,
        width=data.width or spec.width,
        height=data.height or spec.height,
        fit=data.video_reshape_mode,
        random_crops=data.random_crops if data.video_reshape_mode == "random" else 1,
        flip=data.random_flip > 0,
        skip_frames_start=data.skip_frames_start,
        skip_frames_end=data.skip_frames_end,
        long_clips=data.long_clips,
        seed=0,  # random crops are drawn from each clip's content
    )
    return Plan(
        spec=spec,
        base=label(name),
        folder=folder,
        device=device,
        precision=resolve_precision(config.compute, device),
        gradient_checkpointing=_resolve_checkpointing(config.compute, device),
        sampling=sampling,
        seed=secrets.randbits(31) if config.compute.seed is None else config.compute.seed,
    )


def resolve_precision(config: ComputeConfig, device: str) -> Precision:
    """Return what the base computes in on a device of this type."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    if device == "cpu":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def label(name: str) -> str:
    """Return a base's name as others may see it: the last part of a folder."""
    folder = Path(name).expanduser()
    return folder.resolve().name if name not in specs.SPECS and folder.is_dir() else name


def _resolve_checkpointing(config: ComputeConfig, device: str) -> bool:
    """On by default on a GPU, and with fp8, whose unpacked weights would be kept for the backward pass."""
    fp8 = config.base_precision == "fp8"
    if fp8 and config.gradient_checkpointing is False:
        raise UserError(
            "base_precision=fp8 saves nothing with gradient_checkpointing=false: unpacked weights are kept "
            "for the backward pass. Leave gradient_checkpointing empty, or use base_precision=auto."
        )
    return device != "cpu" or fp8 if config.gradient_checkpointing is None else config.gradient_checkpointing


def _check_base(name: str, task: Task, validation: ValidationConfig) -> None:
    if task not in TRAINABLE:
        known = [each for kind in TRAINABLE for each in specs.names_for(kind)]
        raise UserError(
            f"COGVIDEOX_MODEL={name} is a model for {specs.TASK_NAMES[task]}; LoRAs are trained for "
            f"image to video and text to video, on {', '.join(known)}."
        )
    prompts, images = len(validation.prompts), len(validation.validation_images)
    if task == "t2v" and images:
        raise UserError(
            f"validation_images were given, but {name} makes videos from text alone; leave them out."
        )
    if task == "i2v" and prompts != images:
        raise UserError(
            f"validation needs an image for each prompt, as {name} starts from images; prompts given: "
            f"{prompts} (validation_prompt, separated by {shown(validation.validation_prompt_separator)}), "
            f"validation_images given: {images}."
        )


def _validate_captioner(name: str) -> None:
    """Check a captioner's name, and the config of one that is on this disk."""
    exists = Path(name).expanduser().exists()
    if name in specs.SPECS:
        _check_captioner(name, specs.SPECS[name].task)
    elif not current().local_sources and (exists or not hub.REPOSITORY.fullmatch(name.partition("@")[0])):
        raise UserError(
            f"autocaption_model={shown(name)} is neither a captioning model's name "
            f"({', '.join(specs.names_for('caption'))}) nor a Hub repository (owner/name)."
        )
    if name in specs.DEFAULT_MODELS.values() or exists:
        read_config(locate_captioner(name, print_line))


def _check_captioner(name: str, task: Task) -> None:
    if task != "caption":
        raise UserError(
            f"autocaption_model={name} is a model for {specs.TASK_NAMES[task]}; clips are captioned by "
            f"{', '.join(specs.names_for('caption'))} and models of that kind."
        )


def _check_shape(config: DataConfig, spec: ModelSpec) -> None:
    spec.check_size(config.width or spec.width, config.height or spec.height, any_size=True)
    frames, shortest, longest = config.max_num_frames, spec.frame_step + 1, spec.max_frames
    if frames is not None and not shortest <= frames <= longest:
        nearest = min(max(frames, shortest), longest)
        raise UserError(
            f"max_num_frames={frames} is out of range for {spec.name}: use {shortest} to {longest} "
            f"(nearest: {nearest}), or leave it empty for {spec.frames}."
        )


def _check_channels(name: str, spec: ModelSpec, folder: Path) -> None:
    """Check the transformer's kind: a folder may say image to video and have a text-to-video transformer."""
    transformer = derive.read_config(folder / "transformer" / "config.json", "in_channels out_channels")
    latent = derive.read_config(folder / "vae" / "config.json", "latent_channels")["latent_channels"]
    expected = latent * (2 if spec.task == "i2v" else 1)
    if transformer["in_channels"] != expected:
        raise UserError(
            f"{name} is set up for {specs.TASK_NAMES[spec.task]}, which takes {expected} input channels, but "
            f"its transformer has {transformer['in_channels']}: it is a model for "
            f"{specs.TASK_NAMES['t2v' if spec.task == 'i2v' else 'i2v']}. Give a base of the right kind."
        )


def _wandb_is_set_up() -> bool:
    netrc = Path("~/.netrc").expanduser()
    return (
        os.environ.get("WANDB_MODE") in ("offline", "disabled")
        or bool(os.environ.get("WANDB_API_KEY"))
        or (netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace"))
    )
