"""A worker process of this one: started on a GPU of its own, connected by a pair of sockets.

It ends when its parent does, however that ends, because the parent's end of the sockets closes then. No other
process holds them, so messages can be pickled objects.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exited:
    """The last message about a process, created by its parent."""

    how: str
    """How it ended, such as "was killed by signal 9 (SIGKILL)"."""


class ChildProcess:
    """`python -m module` in a process of its own.

    `on_message` is called with each of its messages, in a thread, and at last with Exited.
    """

    def __init__(
        self, module: str, *, on_message: Callable[[Any], None], environment: dict[str, str]
    ) -> None:
        self._connection_lost = False
        self._connection, theirs = cast("tuple[Connection, Connection]", Pipe())  # not Windows' pipes
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                env=os.environ | _python_path() | environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # the parent handles Ctrl-C
            )
        threading.Thread(target=self._listen, args=[on_message], name=module, daemon=True).start()

    @property
    def has_exited(self) -> bool:
        """Whether it is gone, even if Exited has not arrived yet."""
        return self._connection_lost or self._process.poll() is not None

    def send(self, message: Any) -> None:
        """Send a message. One to a process that is gone is dropped; `on_message` gets Exited."""
        with contextlib.suppress(OSError):
            send(self._connection, message)

    def kill(self) -> None:
        """Kill it and wait until it has exited."""
        self._process.kill()
        self._process.wait()

    def _listen(self, on_message: Callable[[Any], None]) -> None:
        try:
            while True:
                on_message(_receive(self._connection))
        except (EOFError, OSError):
            pass
        except Exception:  # a bug in our code: kill the child, so that no caller waits for its answer
            traceback.print_exc()
            self._process.kill()
        self._connection_lost = True
        on_message(Exited(how=_describe_exit(self._process.wait())))
        self._connection.close()


def gpu_environment(index: int, *, processes: int, gpus: int) -> dict[str, str]:
    """Return the variables that show a process one GPU only, or on a CPU limit it to its share of cores."""
    if not gpus:
        cores = max(1, (os.cpu_count() or 1) // processes)
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(cores)}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}


def connect_to_parent(descriptor: int) -> tuple[Connection, "SimpleQueue[Any]"]:
    """In a child: return the connection for answers and the queue of messages.

    The process exits as soon as its parent is gone.
    """
    connection, inbox = Connection(descriptor), SimpleQueue()

    def listen() -> None:
        try:
            while True:
                inbox.put(_receive(connection))
        except (EOFError, OSError):
            os._exit(0)  # the main thread may be waiting for other processes, or for a GPU
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=listen, name="messages", daemon=True).start()
    return connection, inbox


def send(connection: Connection, message: Any) -> None:
    """Send a message, pickled here: torch makes `Connection.send` pass tensors in shared memory."""
    connection.send_bytes(pickle.dumps(message))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _python_path() -> dict[str, str]:
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{PROJECT}{os.pathsep}{rest}" if rest else str(PROJECT)}


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by signal {-status} ({signal.Signals(-status).name})"
