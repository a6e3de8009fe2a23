"""The processes and devices of a run, its trackers, and advice when memory runs out."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from lib.distributed import accelerate_processes
from lib.errors import UserError
from lib.storage import lock
from lib.storage.disk import disk_error
from training.config import TrainingConfig
from training.groups import PublishingConfig
from training.plan import resolve_precision

Result = TypeVar("Result")
MEMORY_SAVERS: tuple[tuple[str, Callable[[TrainingConfig], bool]], ...] = (
    ("gradient_checkpointing=true", lambda config: config.compute.gradient_checkpointing is False),
    (
        "train_batch_size=1 with gradient_accumulation_steps",
        lambda config: config.optimizer.train_batch_size > 1,
    ),
    ("base_precision=fp8", lambda config: config.compute.base_precision != "fp8"),
    ("optimizer=adamw_8bit", lambda config: not config.optimizer.optimizer.endswith("_8bit")),
    ("a smaller rank", lambda config: config.adapter.rank > 32),
    ("enable_tiling=true", lambda config: not config.compute.enable_tiling),
    ("fewer frames (max_num_frames)", lambda config: True),
)
"""Settings that lower memory, each with the configurations in which it would help."""


def start_accelerator(config: TrainingConfig, run: Path) -> Accelerator:
    """Return this process's accelerator: on a GPU if there is one, in as many processes as were launched.

    Raises UserError for a launch that is not supported. Sharding is among those: a frozen base with a LoRA
    has next to nothing to shard.
    """
    accelerator = accelerate_processes.start_accelerator(
        seconds=config.compute.nccl_timeout,
        mixed_precision=resolve_precision(config.compute, "cuda" if torch.cuda.is_available() else "cpu"),
        log_with=config.publishing.trackers or None,
        project_dir=str(run),
    )
    # Also turns it off after a run in this process that had it on.
    torch.backends.cuda.matmul.allow_tf32 = config.compute.allow_tf32
    return accelerator


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Open the trackers. The key of wandb is in the environment only while it signs in."""
    publishing = config.publishing
    if accelerator.trackers or not publishing.trackers:
        return
    settings = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in config.public().items()
    }
    with _wandb_key(publishing):
        accelerator.init_trackers(
            publishing.tracker_name,
            config=settings,
            init_kwargs={"wandb": {"dir": accelerator.project_dir}},
        )


def log_clips(accelerator: Accelerator, clips: list[tuple[Path, np.ndarray]], *, step: int) -> None:
    """Log validation clips, uint8 [F, H, W, 3], to the trackers."""
    for tracker in accelerator.trackers:
        for index, (path, frames) in enumerate(clips, start=1):
            if tracker.name == "tensorboard":
                video = np.transpose(frames, (0, 3, 1, 2))[None]
                for frame in (0, len(frames) // 2, len(frames) - 1):
                    tracker.writer.add_images(f"validation {index}/frame {frame}", video[:, frame], step)
            elif tracker.name == "wandb":
                import wandb  # an optional package

                tracker.log({f"validation {index}": wandb.Video(str(path), format="mp4")}, step=step)


def from_main(accelerator: Accelerator, make: Callable[[], Result]) -> Result:
    """Call `make` in the main process and return its result in every process."""
    made: list[Any] = [make() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(made)
    return made[0]


def gather_in_order(share: list[Any], accelerator: Accelerator) -> list[Any]:
    """Return in every process the items of a list that was dealt out in turn, in the list's order."""
    if accelerator.num_processes == 1:
        return share
    numbered = gather_object([(place, accelerator.process_index, item) for place, item in enumerate(share)])
    return [item for _, _, item in sorted(numbered, key=lambda entry: entry[:2])]


@contextlib.contextmanager
def exclusive(run: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run's folder. Raises UserError while another process trains there, or if it cannot be made."""
    if not accelerator.is_main_process:
        yield
        return
    refusal = f"another process is training in {run.name}; wait for it, or give another output_dir."
    with lock.exclusive(run, refusal):
        try:
            run.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(error, run) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                run.rmdir()  # only if it stayed empty


@contextlib.contextmanager
def memory_advice(config: TrainingConfig) -> Iterator[None]:
    """Turn running out of GPU memory into a UserError that names the settings which lower it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = [text for text, helps in MEMORY_SAVERS if helps(config)]
        cause = str(error).split(". ")[0]
        problem = UserError(
            f"the GPU has too little memory for these settings ({cause}). Lower it with {', '.join(advice)}."
        )
    else:
        return
    # Raised here, where the error is gone and with it the tensors that its traceback holds.
    free_memory()
    raise problem


def free_memory() -> None:
    """Return unused memory to the device and the system; accelerate leaves reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _wandb_key(publishing: PublishingConfig) -> Iterator[None]:
    name, before = "WANDB_API_KEY", os.environ.get("WANDB_API_KEY")
    if publishing.wandb_api_key:
        os.environ[name] = publishing.wandb_api_key
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif publishing.wandb_api_key:
            del os.environ[name]
