"""Run a module that reads untrusted bytes in a child process with limits on memory and time.

Decoders spin, crash and allocate whatever a damaged file asks for; no thread or signal handler within the
server could stop that, so the child is killed from outside. lib/sandbox/child.py is the child's side and
describes the messages.
"""

import contextlib
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, cast

from lib.cancellation import check_stop

POLL_SECONDS = 0.05
"""How long to wait at a time: exceptions injected into a waiting thread are raised after its wait."""
ROOT = Path(__file__).resolve().parents[2]


class SandboxError(Exception):
    """The child refused its input or exceeded a limit; the message says which, for the user."""


class RefusedError(SandboxError):
    """The child refused its input, in its own words."""


@contextlib.contextmanager
def start(
    module: str,
    arguments: Sequence[str],
    *,
    memory_bytes: int,
    seconds: float,
    cpu_seconds: float | None = None,
    stop: threading.Event | None = None,
) -> Iterator["Sandbox"]:
    """Start `module` in a child process, which is killed when the block is left.

    Args:
        memory_bytes: Limit of the child's address space.
        seconds: Time that may be spent waiting for its messages, its start included.
        cpu_seconds: Limit of its processor time, for one that outlives its parent; from `seconds` if None.
        stop: Waiting raises Stopped soon after this is set.
    """
    cpu_limit = math.ceil(cpu_seconds if cpu_seconds is not None else seconds * 4 + 10)
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(memory_bytes), str(cpu_limit), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=os.environ | threads | {"PYTHONPATH": python_path},
        start_new_session=True,  # Ctrl-C goes to the parent, which then kills the child
    )
    requests, messages = cast(FileIO, process.stdin), cast(FileIO, process.stdout)
    try:
        yield Sandbox(module, process, requests, messages, seconds=seconds, stop=stop)
    finally:
        process.kill()
        process.wait()
        requests.close()
        messages.close()


class Sandbox:
    """A running child."""

    def __init__(
        self, module: str, process: subprocess.Popen[bytes], requests: FileIO, messages: FileIO, *,
        seconds: float, stop: threading.Event | None,
    ) -> None:  # fmt: skip
        self._module = module
        self._process, self._requests, self._messages = process, requests, messages
        self._seconds, self._left, self._stop = seconds, seconds, stop
        self._poll = select.poll()
        self._poll.register(messages, select.POLLIN)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: Any) -> None:
        """Send a request as a line of JSON."""
        with contextlib.suppress(BrokenPipeError):  # the next message says why the child ended
            self._requests.write(json.dumps(request).encode() + b"\n")

    def receive(self, expected: bytes) -> bytearray:
        """Wait for a message of the kind `expected` and return its content.

        Raises:
            SandboxError: The child refused its input, exceeded a limit, or crashed.
            Stopped: `stop` was set; also while the child hangs.
        """
        kind, length = struct.unpack(">cI", self._read_exactly(5))
        payload = self._read_exactly(length)
        if kind == expected:
            return payload
        reason = payload.decode(errors="replace")
        if kind == b"M":
            raise SandboxError("reading it takes too much memory")
        raise RefusedError(reason) if kind == b"E" else self._bug(reason)

    def _read_exactly(self, length: int) -> bytearray:
        buffer = bytearray(length)
        rest = memoryview(buffer)
        while rest:
            check_stop(self._stop)
            started = time.monotonic()
            ready = self._poll.poll(max(0.0, min(self._left, POLL_SECONDS)) * 1000)
            self._left -= time.monotonic() - started
            if not ready and self._left > 0:
                continue
            if not ready:
                raise SandboxError(f"reading it took longer than {self._seconds:g} s")
            count = self._messages.readinto(rest)
            if not count:
                raise self._exit_error()
            rest = rest[count:]
        return buffer

    def _exit_error(self) -> Exception:
        """Return the error for a child that ended without a message."""
        status = self._process.wait()
        if status >= 0:
            return self._bug(f"exit status {status}")
        if status == -signal.SIGXCPU:
            return SandboxError("reading it took too much processor time")
        cause = signal.Signals(-status).name
        return SandboxError(f"the decoder crashed on it ({cause}): it is damaged, or of another kind")

    def _bug(self, reason: str) -> RuntimeError:
        return RuntimeError(f"{self._module} failed: {reason}")
