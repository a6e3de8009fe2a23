"""Videos on several GPUs: script/parallel t2v|i2v [--processes N] [input=value ...] OUTPUT

One clip that all processes make together goes to the file OUTPUT:
  script/parallel t2v prompt="a red circle moves right on a black background" output.mp4
A list of clips, each made by one process, goes to the folder OUTPUT, with a line for each in results.jsonl:
  script/parallel t2v prompts=prompts.txt num_inference_steps=30 clips
A list is a .txt with a prompt on each line, or a .csv or .jsonl with a column or key for each input. Run the
same command again to make what is missing. Without --processes there is one for each GPU.
"""

import os
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast, get_args

from lib import settings
from lib.batch.clip import make_clip
from lib.batch.rows import Row, read_rows, resolve_row
from lib.batch.run import make_list
from lib.cancellation import Stopped
from lib.commands.common import (
    FAILED,
    INTERRUPTED,
    MISUSED,
    allow_local_sources,
    help_status,
    stop_on_signals,
)
from lib.distributed.layout import VARIABLE, parse_layout
from lib.errors import UserError
from lib.models.specs import VideoTask
from lib.progress import LogView
from lib.serving.inputs import input_properties
from lib.serving.registry import find_predictor, local_environment
from lib.serving.schema import input_document

USAGE = "script/parallel t2v|i2v [--processes N] [prompts=LIST] [input=value ...] OUTPUT"
TASKS = get_args(VideoTask)
MAX_PROCESSES = 1024
SHUTDOWN_SECONDS = 30
"""How long after Ctrl-C a clip may take to stop by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLine:
    """The parsed arguments."""

    task: VideoTask
    output: Path
    rows: list[Row]
    is_list: bool
    processes: int | None


def main(arguments: list[str]) -> int:
    """Return the exit status: 0, 1 for an error, 2 for a wrong command line, 130 after Ctrl-C."""
    task = arguments[0] if arguments and arguments[0] in TASKS else "t2v"
    asks_for_help = arguments[1:2] if arguments[:1] == [task] else arguments
    if asks_for_help in (["-h"], ["--help"]) or not arguments:
        status = help_status(asks_for_help, usage=USAGE, about=__doc__ or "", document=_inputs(task))
        return status or 0
    try:
        command = _parse(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return MISUSED
    os.environ |= local_environment(find_predictor(command.task))
    view = LogView()
    try:
        return _make_list(command, view) if command.is_list else _make_clip(command, view)
    except UserError as error:
        view.close()
        print(error, file=sys.stderr)
        return FAILED
    except (Stopped, KeyboardInterrupt):
        signal.alarm(0)
        view.line("stopped; run the same command again to continue" if command.is_list else "stopped")
        return INTERRUPTED
    finally:
        view.close()


def _make_list(command: CommandLine, view: LogView) -> int:
    allow_local_sources()
    stop = stop_on_signals("stopping")
    gpus = _available_gpus(command.processes)
    failed = make_list(
        command.task,
        command.rows,
        command.output,
        processes=command.processes or gpus or 1,
        gpus=gpus,
        stop=stop,
        report=view.line,
    )
    return FAILED if failed else 0


def _make_clip(command: CommandLine, view: LogView) -> int:
    """Make one clip as a server would: this process is the first, a worker pool has the others."""
    allow_local_sources()
    _interrupt_once()
    _set_processes(command.processes)
    _available_gpus(command.processes)
    # Here because they load torch, which reads OMP_NUM_THREADS when it is imported.
    from lib.distributed.worker_pool import LostProcessError
    from lib.predictors.start import start_video

    try:
        with redirect_stdout(cast("TextIO", _Lines(view))):
            predictor = start_video(command.task)
            metrics = make_clip(predictor, command.rows[0].inputs, command.output)
    except LostProcessError as error:
        raise UserError(error.loss) from error
    view.close()
    print(command.output)
    shown = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in metrics.items()}
    print(", ".join(f"{name} {value}" for name, value in sorted(shown.items())), file=sys.stderr)
    return 0


def _set_processes(processes: int | None) -> None:
    """Let --processes choose, unless COGVIDEOX_PARALLEL names a layout. Raises UserError if they differ."""
    setting = settings.current().parallel
    if "cfg" in setting or "ulysses" in setting:
        needed = parse_layout(setting).processes
        if processes not in (None, needed):
            raise UserError(f"{VARIABLE}={setting} takes {needed} processes, not {processes}.")
        processes = needed
    elif processes is not None:
        os.environ[VARIABLE] = str(processes)
    if processes is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def _interrupt_once() -> None:
    """Raise KeyboardInterrupt at the first Ctrl-C or SIGTERM, and exit if the work does not end in time."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        signal.alarm(SHUTDOWN_SECONDS)
        raise KeyboardInterrupt

    def give_up(_number: int, _frame: FrameType | None) -> None:
        os.write(2, b"stopped\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGALRM, give_up)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)


class _Lines:
    """A standard output whose lines go to a LogView."""

    def __init__(self, view: LogView) -> None:
        self._view, self._rest = view, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._view.line(line)
        return len(text)

    def flush(self) -> None:
        """Do nothing: a line is shown when it ends."""


def _inputs(task: str) -> dict[str, Any]:
    return input_document(find_predictor(task).predictor, name="Runner")


def _parse(arguments: list[str]) -> CommandLine:
    if not arguments or arguments[0] not in TASKS:
        raise UserError(f"{arguments[0] if arguments else ''!r} is not t2v or i2v; usage: {USAGE}")
    task, *rest = arguments
    task = cast("VideoTask", task)
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
        rows = read_rows(prompts, common=pairs, document=document)
        return CommandLine(task=task, output=output, rows=rows, is_list=True, processes=processes)
    row = resolve_row(_with_format(pairs, output, document), number=1, document=document)
    return CommandLine(task=task, output=output, rows=[row], is_list=False, processes=processes)


def _with_format(pairs: list[str], output: Path, document: dict[str, Any]) -> dict[str, str]:
    """Return the inputs with output_format from the file's ending. Raises UserError where they differ."""
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
    if not text.isdigit() or not 0 < int(text) <= MAX_PROCESSES:
        raise UserError(f"--processes {text} is out of range: 1 to {MAX_PROCESSES}.")
    return int(text)


def _available_gpus(processes: int | None) -> int:
    """Return the number of GPUs, 0 on a CPU. Raises UserError if --processes needs more."""
    gpus = _count_gpus()
    if gpus and processes is not None and processes > gpus:
        available = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UserError(f"--processes {processes} needs {processes} GPUs; this machine has {available}.")
    return gpus


def _count_gpus() -> int:
    import torch  # after the arguments were checked

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
