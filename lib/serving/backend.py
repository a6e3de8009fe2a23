"""Start and stop coglet: the process that Replicate's images run, without Docker.

Each one has its own scratch directory as working directory, because coglet reads the input schema from
`.cog/openapi_schema.json` there. The project is on PYTHONPATH, so several can run at once.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from lib.serving.client import health
from lib.serving.host import GRACE_SECONDS
from lib.serving.registry import PROJECT, Mode, PredictorConfig, absolute_folders, local_environment
from lib.serving.schema import write_schema

HEALTH_POLL_SECONDS = 0.05
COGLET_TARGET = b'"target":"coglet"'
SLOT_LOST = b"Slot poisoned"
"""In coglet's log when it will answer 409 to everything from now on."""
# What coglet puts before the reason when setup() fails.
SETUP_FAILED = "Setup failed: "


class ServerError(RuntimeError):
    """The server did not start, or ended; the message holds its reason and the end of its log."""


class Backend:
    """A coglet process with its worker process, on a loopback address that nothing else uses.

    Args:
        config: the predictor.
        mode: "predict" or "train".
        environment: variables in addition to this process's.
        on_line: called with each line of the log, and whether a prediction printed it.
        timeout: seconds until it must be ready; None for no limit.
    """

    def __init__(
        self,
        config: PredictorConfig,
        *,
        mode: Mode,
        environment: dict[str, str],
        on_line: Callable[[str, bool], None],
        timeout: float | None,
    ) -> None:
        self.config = config
        self.mode: Mode = mode
        self.environment = environment
        self.timeout = timeout
        self.log: deque[str] = deque(maxlen=1000)
        self.host = _unused_loopback_address()
        self.port = free_port(self.host)
        self.scratch = Path(tempfile.mkdtemp(prefix="cogvideox-server-"))
        self.process: subprocess.Popen[bytes] | None = None
        self._on_line = on_line
        self._worker: psutil.Process | None = None
        self._failed = threading.Event()
        self._logged = threading.Event()
        """Set when coglet has logged something, such as that it accepts requests."""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Start the process; `wait_until_ready` has to follow."""
        write_schema(self.scratch / ".cog" / "openapi_schema.json", self.config.openapi(self.mode))
        (self.scratch / "tmp").mkdir()
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lib.serving.host", str(self.scratch), self.host, self.mode],
            cwd=self.scratch,
            env=self._variables(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Its own group: Ctrl-C in the terminal reaches only the client, which then cancels and stops.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._relay_log, args=(process,), daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Block until requests can be sent. Raises ServerError, also when it is stopped meanwhile."""
        process = self.process
        if process is None:
            raise ServerError(self._failure("it was stopped"))
        self._await(process)
        with suppress(psutil.Error):  # it has ended already
            self._worker = next(iter(psutil.Process(process.pid).children()), None)

    def stop(self) -> None:
        """End the process and all its children, and remove the scratch directory. Safe to repeat.

        An interrupt while this waits for the process kills it, and is raised again.
        """
        process, self.process = self.process, None
        try:
            if process is not None:
                _pipe(process.stdin).close()  # the signal to end, see host.py
                process.wait(timeout=GRACE_SECONDS + 2)
        except subprocess.TimeoutExpired:
            self._on_line("the server did not stop in time and is killed", False)
        finally:
            if process is not None:
                _kill_group(process)
                process.wait()
                self._reader.join(timeout=2)
                _pipe(process.stdout).close()
            shutil.rmtree(self.scratch, ignore_errors=True)

    def exit_status(self) -> int | None:
        """Return the status with which the process ended by itself, None while it runs."""
        return None if self.process is None else self.process.poll()

    def fail(self) -> None:
        """Record that requests can no longer be served."""
        self._failed.set()

    def has_failed(self) -> bool:
        """Return whether the worker process has died, after which coglet answers 409 to everything."""
        try:
            worker = self._worker
            dead = worker is not None and worker.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            dead = True
        return dead or self._failed.is_set()

    def _variables(self) -> dict[str, str]:
        """Return the environment: this process's, the configuration's, and what coglet needs."""
        variables = dict(os.environ) | local_environment(self.config)
        variables.pop("COGVIDEOX_API_TOKEN", None)  # the front checks it; what runs models need not know it
        variables |= absolute_folders(variables)
        # coglet starts its worker as plain `python`, which must be this interpreter.
        variables["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        )
        paths = [str(self.config.file.parent), str(PROJECT), os.environ.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(path for path in dict.fromkeys(paths) if path)
        variables["PYTHONUNBUFFERED"] = "1"
        variables["PYTHONFAULTHANDLER"] = "1"  # a crash in native code shows where it happened
        variables["TMPDIR"] = str(self.scratch / "tmp")
        variables["PORT"] = str(self.port)
        variables["COG_PREDICT_TYPE_STUB"] = f"{self.config.predictor}:{self.config.class_name}"
        if self.config.train is not None:
            variables["COG_TRAIN_TYPE_STUB"] = f"{self.config.train}:{self.config.train_name}"
        return variables | self.environment

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        while True:
            if process.poll() is not None:
                self._reader.join(timeout=2)
                raise ServerError(self._failure(f"the server ended with status {process.returncode}"))
            state = health(self.url)
            status = state.get("status")
            if status in ("READY", "BUSY"):
                return
            if status in ("SETUP_FAILED", "DEFUNCT"):
                raise ServerError(self._failure(_setup_reason(state)))
            if deadline is not None and time.monotonic() > deadline:
                raise ServerError(self._failure(f"the server was not ready after {self.timeout:g} s"))
            self._logged.wait(HEALTH_POLL_SECONDS)
            self._logged.clear()

    def _failure(self, reason: str) -> str:
        return "\n".join([f"{self.config.name} did not start: {reason}", *list(self.log)[-20:]])

    def _relay_log(self, process: subprocess.Popen[bytes]) -> None:
        """Keep what the predictor prints and pass it on, for as long as the process runs."""
        for raw in iter(_pipe(process.stdout).readline, b""):
            if COGLET_TARGET in raw:
                self._logged.set()
            if SLOT_LOST in raw:
                self._failed.set()
            for line, in_prediction in _readable(raw):
                self.log.append(line)
                self._on_line(line, in_prediction)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _unused_loopback_address() -> str:
    """Return a random address of this machine's own network, or 127.0.0.1 where the system has no other."""
    address = ".".join(["127", *(str(1 + secrets.randbelow(254)) for _ in range(3))])
    try:
        free_port(address)
    except OSError:  # macOS
        return "127.0.0.1"
    return address


def _readable(raw: bytes) -> Iterator[tuple[str, bool]]:
    """Yield the lines in one line of coglet's JSON log, and whether a prediction printed them."""
    text = raw.decode(errors="replace").rstrip("\r\n")
    try:
        record = json.loads(text)
        fields, target = record["fields"], record.get("target", "")
    except (ValueError, KeyError, TypeError):
        # Not coglet's own: a traceback, or something printed before it took over the streams.
        yield text, False
        return
    # What is printed at the very end of setup comes as coglet::user.
    printed = target in ("coglet::setup", "coglet::user") or "source" in fields
    if printed or record.get("level") in ("WARN", "ERROR"):
        for line in str(fields.get("message", "")).split("\n"):
            yield line.rstrip(), target == "coglet::prediction"


def _setup_reason(state: dict[str, Any]) -> str:
    """Return the reason in coglet's message, such as `RuntimeError: no weights here`."""
    logs = state.get("setup", {}).get("logs", "") or state.get("status", "")
    reason = logs.rpartition(SETUP_FAILED)[2].strip()
    return reason.removeprefix("setup failed: ")


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "opened with PIPE"
    return stream


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing was left
