"""What the commands that work on this machine have in common: their help, how they begin and are stopped."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from lib.serving.inputs import describe_inputs

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
"""Exit statuses beside 0: an error, a wrong command line, Ctrl-C as shells report it."""


def help_status(arguments: list[str], *, usage: str, about: str, document: dict[str, Any]) -> int | None:
    """Print the help where it is asked for or nothing is given, and return the exit status; None otherwise.

    `about` is the command's docstring, `document` the OpenAPI document of its settings.
    """
    if arguments and arguments[0] not in ("-h", "--help", "help"):
        return None
    with contextlib.suppress(BrokenPipeError):  # the reader, such as `head`, has seen enough
        print(f"usage: {usage}\n\n{about.strip()}\n\nsettings:\n{describe_inputs(document)}", flush=True)
    return 0 if arguments else MISUSED


def begin(stopping: str) -> threading.Event:
    """Make the process ready for work on files of this machine; before torch is imported, in the main thread.

    Returns the event that the first Ctrl-C or SIGTERM sets, which is answered with `stopping` (empty: by
    nothing); the second raises KeyboardInterrupt.
    """
    os.environ.setdefault("COGVIDEOX_LOCAL_SOURCES", "1")
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if stopping:  # past sys.stderr, in the middle of whose print() this may come
            os.write(2, f"\n{stopping}\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop
