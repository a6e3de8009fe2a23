"""Trains on this machine: script/train input_videos=FOLDER output_dir=runs/star [setting=value ...]

Or on several GPUs: accelerate launch --multi_gpu --num_processes 2 -m training input_videos=...
The same command again goes on from the newest checkpoint in output_dir.

output_dir is where checkpoints and results go. input_videos is a folder, zip or tar on this machine; files
are given by their paths.
"""

import os
import sys
from pathlib import Path

from lib.cancellation import Stopped
from lib.commands.common import FAILED, INTERRUPTED, MISUSED, help_status, stop_on_signals
from lib.errors import UserError
from lib.progress import LogView
from lib.serving.inputs import parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import training_inputs
from training.config import SECRETS

USAGE = "script/train input_videos=FOLDER_OR_ARCHIVE [output_dir=runs/lora] [setting=value ...]"
OUTPUT_DIR = "output_dir"


def main(arguments: list[str]) -> int:
    """The exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C."""
    document = training_inputs(PROJECT / "training" / "train.py")
    status = help_status(arguments, usage=USAGE, about=__doc__, document=document)
    if status is not None:
        return status
    sys.argv[1:] = [_without_secret(argument) for argument in arguments]  # trackers record it
    rank = int(os.environ.get("RANK", "0"))
    first = rank == 0
    stop = stop_on_signals("stopping after this step; once more: without a checkpoint" if first else "")
    view = LogView()
    try:
        pairs, run = _split(arguments)
        values = parse_inputs(pairs, document, send_files=False)
        from training.entry import config_from, run_locally  # not needed for the help

        config = config_from(values)
    except UserError as error:
        if first:  # the others are told the same
            print(error, file=sys.stderr)
        return MISUSED
    try:
        result = run_locally(config, run, stop=stop, report=view.line)
    except UserError as error:
        view.close()
        # One alone of several may fail, whose GPU has too little memory for example.
        print(error if first else f"process {rank}: {error}", file=sys.stderr)
        return FAILED
    except (Stopped, KeyboardInterrupt):
        view.close()
        if first:
            print(_what_is_left(run), file=sys.stderr)
        return INTERRUPTED
    view.close()
    if first:
        print(result / "lora.safetensors")
    return 0


def _split(arguments: list[str]) -> tuple[list[str], Path]:
    """The settings, and the run's folder."""
    folder, pairs = "runs/lora", []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not setting=value; usage: {USAGE}")
        if name == OUTPUT_DIR:
            folder = value
        else:
            pairs.append(argument)
    return pairs, Path(folder or "runs/lora").expanduser().absolute()


def _without_secret(argument: str) -> str:
    name, equals, _ = argument.partition("=")
    return f"{name}=..." if equals and name in SECRETS else argument


def _what_is_left(run: Path) -> str:
    if any((run / "checkpoints").glob("step-*[0-9]")):
        return f"stopped; the same command goes on from the checkpoint in {run}"
    if any(run.glob("captions*.jsonl")):
        return f"stopped before the first checkpoint; the same command keeps the captions in {run}"
    return "stopped before the first checkpoint"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
