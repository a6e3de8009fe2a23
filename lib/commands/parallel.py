"""Videos on several GPUs: script/parallel t2v|i2v [--processes N] [input=value ...] OUTPUT

One clip that all processes make together goes to the file OUTPUT:
  script/parallel t2v prompt="a red circle moves right on a black background" output.mp4
A list of clips, each made by one process, goes to the folder OUTPUT, with a line each in its results.jsonl:
  script/parallel t2v prompts=prompts.txt num_inference_steps=30 clips
A list is a .txt with a prompt on each line, or a .csv or .jsonl with a column or key for each input. The same
command again makes what is missing. Without --processes there is one for each GPU.
For one clip on several machines: torchrun ... -m lib.parallel t2v [input=value ...] OUTPUT
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.batch.rows import Row, read_rows, settled_row
from lib.cancellation import Stopped
from lib.commands.common import FAILED, INTERRUPTED, MISUSED, help_status, stop_on_signals
from lib.errors import UserError
from lib.serving.inputs import input_properties
from lib.serving.registry import find_predictor, local_environment
from lib.serving.schema import training_inputs

USAGE = "script/parallel t2v|i2v [--processes N] [prompts=LIST] [input=value ...] OUTPUT"
TASKS = ("t2v", "i2v")
MOST_PROCESSES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A command line."""

    task: str
    output: Path
    rows: list[Row]
    is_list: bool
    processes: int | None


def main(arguments: list[str]) -> int:
    """The exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C."""
    task = arguments[0] if arguments and arguments[0] in TASKS else "t2v"
    document = _inputs(task)
    asks_for_help = arguments[1:2] if arguments[:1] == [task] else arguments
    if asks_for_help in (["-h"], ["--help"]) or not arguments:
        return help_status(asks_for_help, usage=USAGE, about=__doc__, document=document)
    rank = int(os.environ.get("RANK", "0"))
    try:
        asked = _parse(arguments)
    except UserError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return MISUSED
    os.environ |= local_environment(find_predictor(asked.task))
    try:
        return _run(asked, arguments)
    except UserError as error:
        if rank == 0:
            print(error, file=sys.stderr)
        return FAILED
    except (Stopped, KeyboardInterrupt):
        return INTERRUPTED


def _run(asked: Asked, arguments: list[str]) -> int:
    if "RANK" in os.environ:
        from lib.distributed.clip import take_rank

        return take_rank(asked.task, asked.rows[0].inputs, asked.output)
    stop = stop_on_signals("stopping" if asked.is_list else "")
    gpus = _gpus()
    processes = asked.processes or gpus or 1
    if gpus and processes > gpus:
        has = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UserError(f"--processes {processes} needs {processes} GPUs; this machine has {has}.")
    if asked.is_list:
        from lib.batch.run import make_list

        return make_list(asked.task, asked.rows, asked.output, processes=processes, gpus=gpus, stop=stop)
    for number in (signal.SIGINT, signal.SIGTERM):  # the launcher's to answer
        signal.signal(number, signal.default_int_handler)
    from lib.distributed.launch import launch

    return launch(arguments, processes=processes)


def _inputs(task: str) -> dict[str, Any]:
    return training_inputs(find_predictor(task).predictor, name="Runner")


def _parse(arguments: list[str]) -> Asked:
    if not arguments or arguments[0] not in TASKS:
        raise UserError(f"{arguments[0] if arguments else ''!r} is not t2v or i2v; usage: {USAGE}")
    task, *rest = arguments
    document = _inputs(task)
    processes, pairs, output, prompts = None, [], None, None
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--processes":
            processes = _count(value if equals else next(words, ""))
        elif equals and name == "prompts":
            prompts = Path(value).expanduser()
        elif equals and name.isidentifier():
            pairs.append(word)
        elif output is None and not word.startswith("-"):
            output = Path(word).expanduser()
        else:
            raise UserError(f"{word!r} is not input=value; usage: {USAGE}")
    if output is None:
        raise UserError(f"no output is given; usage: {USAGE}")
    if prompts is not None:
        rows = read_rows(prompts, settings=pairs, document=document)
        return Asked(task=task, output=output, rows=rows, is_list=True, processes=processes)
    row = settled_row(_with_format(pairs, output, document), number=1, document=document)
    return Asked(task=task, output=output, rows=[row], is_list=False, processes=processes)


def _with_format(pairs: list[str], output: Path, document: dict[str, Any]) -> dict[str, str]:
    """The settings, with the format that the file's ending says. Raises UserError where they differ."""
    texts = dict(pair.split("=", 1) for pair in pairs)
    ending = output.suffix.removeprefix(".").lower()
    formats = input_properties(document)["output_format"]["enum"]
    if ending not in formats or texts.setdefault("output_format", ending) != ending:
        wanted = texts.get("output_format") or " or .".join(formats)
        raise UserError(f"OUTPUT {output} has to end in .{wanted}; a list of clips needs prompts=LIST.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"OUTPUT {output}: the folder {output.parent} does not exist.")
    return texts


def _count(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= MOST_PROCESSES:
        raise UserError(f"--processes {text} is out of range: 1 to {MOST_PROCESSES}.")
    return int(text)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
