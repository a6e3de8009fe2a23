"""Trains a LoRA on this machine: script/train input_videos=FOLDER output_dir=runs/star [setting=value ...]

On several GPUs: accelerate launch --multi_gpu --num_processes 2 -m training input_videos=...
The same command again resumes from the newest checkpoint in output_dir.

Checkpoints and results are written to output_dir. input_videos is a folder, zip or tar on this machine;
files are given by their paths.
"""

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.commands.common import Job, checking_arguments, help_status, run_job
from lib.errors import UserError
from lib.progress import Report
from lib.serving.inputs import parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import input_document
from training.config import TrainingConfig, all_settings

USAGE = "script/train input_videos=FOLDER_OR_ARCHIVE [output_dir=runs/lora] [setting=value ...]"
DEFAULT_RUN = "runs/lora"


def main(arguments: list[str]) -> int:
    """Run the command. Returns 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C."""
    document = input_document(PROJECT / "training" / "train.py")
    status = help_status(arguments, usage=USAGE, about=__doc__ or "", document=document)
    if status is not None:
        return status
    sys.argv[1:] = [_without_secret(argument) for argument in arguments]  # trackers record sys.argv

    def prepare() -> tuple[Job, Callable[[], str]]:
        with checking_arguments():
            pairs, run = _split(arguments)
            config = TrainingConfig.from_inputs(**parse_inputs(pairs, document, send_files=False))
        return partial(_train, config, run), lambda: _resume_hint(run)

    return run_job(prepare, stopping="stopping after this step; once more: without a checkpoint")


def _train(config: TrainingConfig, run: Path, *, report: Report, stop: threading.Event) -> Path:
    from training.trainer import train  # torch is not needed for the help and for refusing settings

    return train(config, run, stop=stop, report=report) / "lora.safetensors"


def _split(arguments: list[str]) -> tuple[list[str], Path]:
    """Return the settings and the run's folder."""
    folder, pairs = DEFAULT_RUN, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not setting=value; usage: {USAGE}")
        if name == "output_dir":
            folder = value
        else:
            pairs.append(argument)
    return pairs, Path(folder or DEFAULT_RUN).expanduser().absolute()


def _without_secret(argument: str) -> str:
    name, equals, _ = argument.partition("=")
    secret = name in [each.name for _, each in all_settings() if each.role == "secret"]
    return f"{name}=..." if equals and secret else argument


def _resume_hint(run: Path) -> str:
    if any((run / "checkpoints").glob("step-*[0-9]")):
        return f"stopped; the same command resumes from the checkpoint in {run}"
    if any(run.glob("captions*.jsonl")):
        return f"stopped before the first checkpoint; the same command keeps the captions in {run}"
    return "stopped before the first checkpoint"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
