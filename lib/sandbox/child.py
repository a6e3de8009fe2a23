"""The child's side of a sandboxed process: limits on itself, messages to its parent.

    def serve(arguments: list[str], out: Out) -> None:
        request = read_request()
        out.send(b"F", pixels)

    if __name__ == "__main__":
        sys.exit(run(serve))

Every message on stdout is one kind byte, a 4-byte big-endian length and that many bytes. Three kinds are
taken: `E` says why the input is refused, `M` that memory ran out, `B` reports a bug of ours.
"""

import contextlib
import fcntl
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

PIPE_BYTES = 1 << 20
"""Linux's limit for any user; at the default of 64 KiB a large frame takes a hundred wake-ups."""


class Refused(Exception):
    """The input cannot be read; the message is shown to the user."""


class Out:
    """The pipe to the parent."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        with contextlib.suppress(AttributeError, OSError):  # Linux only
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def send(self, kind: bytes, payload: bytes | memoryview) -> None:
        """Send one message. Raises BrokenPipeError when the parent is done."""
        for part in (struct.pack(">cI", kind, len(payload)), payload):
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


def read_request() -> Any:
    """Return the next line of JSON from the parent, None when there is none."""
    line = sys.stdin.buffer.readline()
    return json.loads(line) if line else None


def run(serve: Callable[[list[str], Out], None]) -> int:
    """Limit this process as its command line says, call `serve`, and return the exit status."""
    memory_bytes, cpu_seconds = int(sys.argv[1]), int(sys.argv[2])
    # The pipe is for messages: what a library prints goes to stderr.
    out = Out(os.dup(1))
    os.dup2(2, 1)
    try:
        _limit_resources(memory_bytes, cpu_seconds)
        serve(sys.argv[3:], out)
    except BrokenPipeError:  # the parent is done
        return 0
    except Refused as error:
        out.send(b"E", str(error).encode(errors="replace"))
        return 1
    except MemoryError:
        out.send(b"M", b"")
        return 1
    except Exception as error:
        out.send(b"B", f"{type(error).__name__}: {error}".encode(errors="replace"))
        return 1
    return 0


def _limit_resources(memory_bytes: int, cpu_seconds: int) -> None:
    """Limit memory, and CPU time for when the parent died without killing this process."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    limits = {resource.RLIMIT_CPU: cpu_seconds, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":  # macOS refuses RLIMIT_AS
        limits[resource.RLIMIT_AS] = memory_bytes
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        if hard == resource.RLIM_INFINITY or value < hard:
            resource.setrlimit(limit, (value, hard))
