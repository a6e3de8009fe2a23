"""The processes and devices of a run, its trackers, and what to do when memory runs out."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lib.distributed import accelerate_processes
from lib.errors import UserError
from lib.storage.disk import disk_error
from lib.storage.lock import lock
from training.config import TrainingConfig
from training.memory import free_memory
from training.plan import precision, trackers

Made = TypeVar("Made")
FEWER_BYTES = (
    ("gradient_checkpointing=true", lambda config: config.gradient_checkpointing is False),
    ("train_batch_size=1 with gradient_accumulation_steps", lambda config: config.train_batch_size > 1),
    ("base_precision=fp8", lambda config: config.base_precision != "fp8"),
    ("optimizer=adamw_8bit", lambda config: not config.optimizer.endswith("_8bit")),
    ("a smaller rank", lambda config: config.rank > 32),
    ("enable_tiling=true", lambda config: not config.enable_tiling),
    ("fewer frames (max_num_frames)", lambda config: True),
)


def start_accelerator(config: TrainingConfig, run: Path) -> Accelerator:
    """The accelerator of this process: GPU if there is one, as many processes as `accelerate launch` began.

    Raises UserError as start_accelerator does. Sharding is refused there: a frozen base with a
    LoRA has next to nothing to shard.
    """
    accelerator = accelerate_processes.start_accelerator(
        seconds=config.nccl_timeout,
        mixed_precision=precision(config, "cuda" if torch.cuda.is_available() else "cpu"),
        log_with=list(trackers(config)) or None,
        project_dir=str(run),
    )
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32  # also off again after a run that had it
    return accelerator


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Open the trackers. The key of wandb is in the environment only for as long as it signs in."""
    if not accelerator.trackers and trackers(config):
        with _variable("WANDB_API_KEY", config.wandb_api_key):
            accelerator.init_trackers(
                config.tracker_name,
                config=_flat(config.public()),
                init_kwargs={"wandb": {"dir": accelerator.project_dir}},
            )


def log_clips(accelerator: Accelerator, clips: list[tuple[Path, np.ndarray]], *, fps: int, step: int) -> None:
    """Validation clips, uint8 [F, H, W, 3], to the trackers."""
    for tracker in accelerator.trackers:
        for index, (path, frames) in enumerate(clips, start=1):
            if tracker.name == "tensorboard":
                video = np.transpose(frames, (0, 3, 1, 2))[None]
                for frame in (0, len(frames) // 2, len(frames) - 1):
                    tracker.writer.add_images(f"validation {index}/frame {frame}", video[:, frame], step)
            elif tracker.name == "wandb":
                import wandb

                tracker.log({f"validation {index}": wandb.Video(str(path), format="mp4")}, step=step)


def from_main(accelerator: Accelerator, make: Callable[[], Made]) -> Made:
    """What `make` returns, in every process; only the main one calls it."""
    made = [make() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(made)
    return made[0]


@contextlib.contextmanager
def alone(run: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run's folder. Raises UserError while another process trains there, and where none can be."""
    if not accelerator.is_main_process:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            run.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(lock(run, print, wait=False))
        except OSError as error:
            raise disk_error(error, run) from error
        if not held:
            raise UserError(
                f"another process is training in {run.name}; wait for it, or give another output_dir."
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                run.rmdir()  # only if it stayed empty


@contextlib.contextmanager
def memory_advice(config: TrainingConfig) -> Iterator[None]:
    """Running out of GPU memory as a UserError that names the settings which lower it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = [text for text, helps in FEWER_BYTES if helps(config)]
        told = str(error).split(". ")[0]
        problem = UserError(
            f"the GPU has too little memory for these settings ({told}). Lower it with {', '.join(advice)}."
        )
    else:
        return
    # Raised where the error and the tensors that its traceback holds are gone.
    free_memory()
    raise problem


def _flat(settings: dict) -> dict:
    """What every tracker can store."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in settings.items()
    }


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    if value:
        os.environ[name] = value
    try:
        yield
    finally:
        if value and before is None:
            del os.environ[name]
        elif value:
            os.environ[name] = before
