"""A process of ours beside this one: started on a GPU of its own, spoken with through a pair of sockets.

It ends when this process does, however that ends: its end of the sockets closes then. Nobody else holds them,
so that messages can be pickled objects.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The last that is heard of a process."""

    how: str
    """As in "was killed by signal 9"."""


class Process:
    """`python -m module`, whose messages `hear` gets in a thread of their own, at last Ended."""

    def __init__(self, module: str, *, hear: Callable[[Any], None], environment: Mapping[str, str]) -> None:
        self._silent = False
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                env=os.environ | _finding_modules() | environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is this process's to answer
            )
        threading.Thread(target=self._listen, args=[hear], name=module, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether it is gone, even where Ended has not been heard yet."""
        return self._silent or self._process.poll() is not None

    def tell(self, message: Any) -> None:
        """Send a message; one that is gone does not get it, and is heard of through `hear`."""
        with contextlib.suppress(OSError):
            send(self._connection, message)

    def kill(self) -> None:
        """End it at once, and wait until it has."""
        self._process.kill()
        self._process.wait()

    def _listen(self, hear: Callable[[Any], None]) -> None:
        try:
            while True:
                hear(_receive(self._connection))
        except (EOFError, OSError):
            pass
        except Exception:  # a fault of ours; whoever waits for an answer is to hear of it
            traceback.print_exc()
            self._process.kill()
        self._silent = True
        hear(Ended(how=_how(self._process.wait())))
        self._connection.close()


def own_gpu(index: int, *, processes: int, gpus: int) -> dict[str, str]:
    """The environment of a process that sees the `index`-th GPU alone, or on a CPU its share of the cores."""
    if not gpus:
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(_share(processes))}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}


def messages(descriptor: int) -> tuple[Connection, "SimpleQueue[Any]"]:
    """In the started process: what it answers through, and what it is told. It ends when nobody is left."""
    connection, told = Connection(descriptor), SimpleQueue()

    def listen() -> None:
        try:
            while True:
                told.put(_receive(connection))
        except (EOFError, OSError):
            os._exit(0)  # the main thread may be waiting for other processes, or for a GPU
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=listen, name="messages", daemon=True).start()
    return connection, told


def send(connection: Connection, message: Any) -> None:
    """Send a message. Not with the connection's own `send`: for tensors torch makes that share memory."""
    connection.send_bytes(pickle.dumps(message))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _finding_modules() -> dict[str, str]:
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{PROJECT}{os.pathsep}{rest}" if rest else str(PROJECT)}


def _share(processes: int) -> int:
    return max(1, (os.cpu_count() or 1) // processes)


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by signal {-status} ({signal.Signals(-status).name})"
