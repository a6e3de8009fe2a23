"""What a run will do on this machine: the configuration with all settled and checked before any work."""

import importlib.util
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.errors import UserError
from lib.models import derive, specs
from lib.models.specs import ModelSpec, Task
from lib.network import hub
from lib.network.urls import local_sources_allowed
from lib.weights import checkpoints
from training.clips import Sampling
from training.config import DEFAULT_STEPS, MAX_WARMUP_STEPS, TrainingConfig

TRAINABLE: tuple[Task, ...] = ("i2v", "t2v")
CAPTIONER = "cogvlm2-caption"
"""What CogVideoX's own training captions were made with."""
LIBRARIES = {
    "adam_8bit": "bitsandbytes",
    "adamw_8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything the trainer needs to know besides the data."""

    config: TrainingConfig
    spec: ModelSpec
    base: str
    """The base's name without a path of this machine."""
    folder: Path
    """Its whole diffusers folder."""
    device: str
    precision: Literal["no", "fp16", "bf16"]
    """What the base computes in; its weights are kept in the same type (see `dtype`)."""
    gradient_checkpointing: bool
    sampling: Sampling
    seed: int

    @property
    def dtype(self) -> Literal["float32", "float16", "bfloat16"]:
        """The frozen weights' type. A CPU keeps float32, where 16 bits save little and lose speed."""
        if self.device == "cpu":
            return "float32"
        return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.precision]

    @property
    def is_i2v(self) -> bool:
        return self.spec.task == "i2v"


def base_name() -> str:
    """COGVIDEOX_MODEL, or the embedded image-to-video model."""
    return os.environ.get("COGVIDEOX_MODEL") or specs.DEFAULT_MODELS["i2v"]


def check_at_the_door(config: TrainingConfig, name: str, device: str) -> None:
    """Refuse what cannot work, before data or weights are touched.

    Raises UserError for a base that is not trained here, a captioner that is none, and for an optimizer,
    tracker or precision that this machine lacks.
    """
    if name in specs.SPECS:
        _check_base(name, specs.SPECS[name].task, config)
        _check_shape(config, specs.SPECS[name])
    elif Path(name).expanduser().is_dir():  # of a repository only the task is known before the download
        settle(config, name, locate_base(name, config, print), device)
    if config.autocaption:
        _check_captioner_at_the_door(captioner_name(config, label(name)))
    _checkpointing(config, device)
    if config.optimizer.endswith("_8bit") and device == "cpu":
        raise UserError(
            f"optimizer={config.optimizer} needs an NVIDIA GPU; on this CPU take {config.optimizer[:-5]}."
        )
    if config.mixed_precision == "fp16" and device == "cpu":
        raise UserError("mixed_precision=fp16 needs a GPU; on this CPU take no or bf16.")
    for what in (config.optimizer, *trackers(config)):
        library = LIBRARIES.get(what)
        if library and importlib.util.find_spec(library) is None:
            raise UserError(
                f"{what} needs the package {library}, which is not installed: pip install {library}"
            )
    if config.report_to in ("wandb", "all") and not (config.wandb_api_key or _wandb_is_set_up()):
        raise UserError(f"report_to={config.report_to} needs wandb_api_key (or WANDB_API_KEY).")


def trackers(config: TrainingConfig) -> tuple[str, ...]:
    """The trackers by name."""
    if config.report_to == "none":
        return ()
    return ("tensorboard", "wandb") if config.report_to == "all" else (config.report_to,)


def locate_base(name: str, config: TrainingConfig, report: Callable[[str], None]) -> Path:
    """The base's folder, downloaded if need be; of a repository the task is checked before the download."""
    return checkpoints.locate(
        name,
        check=lambda index: _check_base(name, derive.task_of(index, name), config),
        report=report,
    )


def captioner_name(config: TrainingConfig, base: str) -> str:
    """The model that captions clips for a base of this name: autocaption_model, or the base's default."""
    embedded = base in specs.DEFAULT_MODELS.values()
    return config.autocaption_model or (specs.DEFAULT_MODELS["caption"] if embedded else CAPTIONER)


def locate_captioner(name: str, report: Callable[[str], None]) -> Path:
    """The captioner's folder, downloaded if need be. Raises UserError when it is no captioning model."""
    return checkpoints.locate(
        name, check=lambda index: _check_captioner(name, derive.task_of(index, name)), report=report
    )


def settle(config: TrainingConfig, name: str, folder: Path, device: str) -> Plan:
    """The plan for a base in `folder`. Raises UserError for sizes, lengths and models that do not fit."""
    spec = derive.spec_for(name, folder)
    _check_channels(name, spec, folder)
    _check_shape(config, spec)
    seed = secrets.randbits(31) if config.seed is None else config.seed
    random_crops = config.video_reshape_mode == "random"
    return Plan(
        config=config,
        spec=spec,
        base=label(name),
        folder=folder,
        device=device,
        precision=precision(config, device),
        gradient_checkpointing=_checkpointing(config, device),
        sampling=Sampling(
            fps=config.fps or spec.fps,
            frame_step=spec.frame_step,
            max_frames=config.max_num_frames or spec.frames,
            width=config.width or spec.width,
            height=config.height or spec.height,
            fit=config.video_reshape_mode,
            random_crops=config.random_crops if random_crops else 1,
            flip=config.random_flip > 0,
            skip_frames_start=config.skip_frames_start,
            skip_frames_end=config.skip_frames_end,
            long_clips=config.long_clips,
            seed=0,  # random crops are drawn from each clip's content
        ),
        seed=seed,
    )


def label(name: str) -> str:
    """A base's name in what others may see: of a folder its last part."""
    folder = Path(name).expanduser()
    return folder.resolve().name if name not in specs.SPECS and folder.is_dir() else name


def _checkpointing(config: TrainingConfig, device: str) -> bool:
    """On a GPU, and with fp8: without it every layer's unpacked weights are kept for the backward pass."""
    fp8 = config.base_precision == "fp8"
    if fp8 and config.gradient_checkpointing is False:
        raise UserError(
            "base_precision=fp8 saves nothing with gradient_checkpointing=false: what is unpacked stays for "
            "the backward pass. Leave gradient_checkpointing empty, or base_precision=auto."
        )
    return device != "cpu" or fp8 if config.gradient_checkpointing is None else config.gradient_checkpointing


def total_steps(config: TrainingConfig, samples: int, global_batch: int) -> int:
    """Optimizer steps of the whole run; an epoch is rounded up to whole steps."""
    if config.num_train_epochs is not None:
        return -(-samples * config.num_train_epochs // global_batch)
    return config.max_train_steps or DEFAULT_STEPS


def warmup_steps(config: TrainingConfig, steps: int) -> int:
    """Of the learning rate: as given, else a tenth of all, at most what the original trainer takes."""
    return min(MAX_WARMUP_STEPS, steps // 10) if config.lr_warmup_steps is None else config.lr_warmup_steps


def _check_base(name: str, task: Task, config: TrainingConfig) -> None:
    if task not in TRAINABLE:
        known = [each for kind in TRAINABLE for each in specs.names_for(kind)]
        raise UserError(
            f"COGVIDEOX_MODEL={name} is a model for {specs.TASK_NAMES[task]}; LoRAs are trained for "
            f"image to video and text to video, on {', '.join(known)}."
        )
    prompts, images = len(config.validation_prompts), len(config.validation_images)
    if task == "t2v" and images:
        raise UserError(
            f"validation_images were given, but {name} makes videos from text alone; leave them out."
        )
    if task == "i2v" and prompts != images:
        raise UserError(
            f"validation needs an image for each prompt, as {name} starts from images: there are {prompts} "
            f"prompts (validation_prompt, separated by {config.validation_prompt_separator!r}) and {images} "
            "validation_images."
        )


def _check_captioner_at_the_door(name: str) -> None:
    """Of a repository the rest is known when it is looked at; where it is, is the downloader's to say."""
    if name in specs.SPECS:
        _check_captioner(name, specs.SPECS[name].task)
    elif not local_sources_allowed() and (
        Path(name).expanduser().exists() or not hub.REPOSITORY.fullmatch(name.partition("@")[0])
    ):
        raise UserError(
            f"autocaption_model={name!r} is neither a captioning model's name "
            f"({', '.join(specs.names_for('caption'))}) nor a Hub repository (owner/name)."
        )
    if name in specs.DEFAULT_MODELS.values() or Path(name).expanduser().exists():
        from lib.caption.config import read_config

        read_config(locate_captioner(name, print))


def _check_captioner(name: str, task: Task) -> None:
    if task != "caption":
        raise UserError(
            f"autocaption_model={name} is a model for {specs.TASK_NAMES[task]}; clips are captioned by "
            f"{', '.join(specs.names_for('caption'))} and models of that kind."
        )


def _check_shape(config: TrainingConfig, spec: ModelSpec) -> None:
    width, height = config.width or spec.width, config.height or spec.height
    spec.check_size(width, height, any_size=True)
    frames = config.max_num_frames
    if frames is None:
        return
    if frames <= spec.frame_step or frames > spec.max_frames:
        nearest = min(max(frames, spec.frame_step + 1), spec.max_frames)
        raise UserError(
            f"max_num_frames={frames} is out of range for {spec.name}: {spec.frame_step + 1} to "
            f"{spec.max_frames}. The nearest is {nearest}; empty means {spec.frames}."
        )


def _check_channels(name: str, spec: ModelSpec, folder: Path) -> None:
    """A folder may call itself image to video and hold a text-to-video transformer, or the reverse."""
    transformer = derive.read_config(folder / "transformer" / "config.json", "in_channels out_channels")
    latent = derive.read_config(folder / "vae" / "config.json", "latent_channels")["latent_channels"]
    wanted = latent * (2 if spec.task == "i2v" else 1)
    if transformer["in_channels"] != wanted:
        raise UserError(
            f"{name} is set up for {specs.TASK_NAMES[spec.task]}, which takes {wanted} input channels, but "
            f"its transformer has {transformer['in_channels']}: it is a model for "
            f"{specs.TASK_NAMES['t2v' if spec.task == 'i2v' else 'i2v']}. Give a base of the right kind."
        )


def precision(config: TrainingConfig, device: str) -> Literal["no", "fp16", "bf16"]:
    """What the base computes in on a device of this type."""
    import torch

    if config.mixed_precision != "auto":
        return config.mixed_precision
    if device == "cpu":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _wandb_is_set_up() -> bool:
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
    return offline or bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _netrc()


def _netrc() -> str:
    path = Path("~/.netrc").expanduser()
    return path.read_text(errors="replace") if path.is_file() else ""
