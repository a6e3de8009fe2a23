"""Shared by the commands: exit statuses, help, and stopping on Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.progress import LogView, silent
from lib.serving.backend import ServerError
from lib.serving.client import Canceled, PredictionError
from lib.serving.inputs import describe_inputs
from lib.serving.signature import SignatureError

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
"""Exit statuses other than 0: an error, a wrong command line, Ctrl-C as shells report it."""
READER_GONE, TERMINATED = 141, 143
"""Exit statuses with which shells report SIGPIPE and SIGTERM."""
EXAMPLE_PROMPT = "a red circle moves right on a black background"


Job = Callable[..., object]


class MisusedError(UserError):
    """A wrong command line."""


def run_command(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command and return its exit status. Errors that the caller can fix are one line, no traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return command(arguments)
    except (UserError, PredictionError, ServerError, SignatureError) as error:
        print(error, file=sys.stderr)
        return MISUSED if isinstance(error, MisusedError) else FAILED
    except (KeyboardInterrupt, Canceled):
        print("cancelled", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def run_job(prepare: Callable[[], tuple[Job, Callable[[], str]]], *, stopping: str) -> int:
    """Run a long job in this terminal, one of several processes perhaps, and return its exit status.

    `prepare` checks the arguments and returns the job, and what to say when it was stopped. The job takes
    `report` and `stop` and returns what to print, None when another process reports why it failed.
    `stopping` is printed at Ctrl-C. The first process alone prints what is the same in all.
    """
    rank = int(os.environ.get("RANK", "0"))
    first = rank == 0
    allow_local_sources()
    stop, view = stop_on_signals(stopping if first else ""), LogView()
    try:
        job, stopped = prepare()
    except UserError as error:
        if first:
            print(error, file=sys.stderr)
        return MISUSED if isinstance(error, MisusedError) else FAILED
    try:
        result = job(report=view.line if first else silent, stop=stop)
    except UserError as error:
        view.close()
        # A single process of several may fail, for example because its GPU has too little memory.
        print(error if first else f"process {rank}: {error}", file=sys.stderr)
        return FAILED
    except (Stopped, KeyboardInterrupt):
        view.close()
        if first:
            print(stopped(), file=sys.stderr)
        return INTERRUPTED
    view.close()
    if first and result is not None:
        print(result)
    return 0 if result is not None else FAILED


@contextlib.contextmanager
def checking_arguments() -> Iterator[None]:
    """Raise MisusedError for a UserError inside the block: it is about the arguments alone."""
    try:
        yield
    except UserError as error:
        raise MisusedError(str(error)) from error


def help_status(arguments: list[str], *, usage: str, about: str, document: dict[str, Any]) -> int | None:
    """Print the help where it is asked for or no arguments are given, and return the exit status, else None.

    `about` is the command's docstring, `document` the OpenAPI document of its settings.
    """
    if arguments and arguments[0] not in ("-h", "--help", "help"):
        return None
    with contextlib.suppress(BrokenPipeError):  # the reader, such as `head`, has exited
        print(f"usage: {usage}\n\n{about.strip()}\n\nsettings:\n{describe_inputs(document)}", flush=True)
    return 0 if arguments else MISUSED


def allow_local_sources() -> None:
    """Let the caller of a command name local files and http addresses, unless the variable forbids it."""
    os.environ.setdefault("COGVIDEOX_LOCAL_SOURCES", "1")


def stop_on_signals(message: str) -> threading.Event:
    """Return an event that the first Ctrl-C or SIGTERM sets; the second raises KeyboardInterrupt.

    `message` is printed at the first, unless it is empty. Must be called in the main thread.
    """
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if message:  # not through sys.stderr, which the signal may have interrupted
            os.write(2, f"\n{message}\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)
