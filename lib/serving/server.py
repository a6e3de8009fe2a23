"""Start and stop a local coglet server: the HTTP server that Replicate runs, without Docker.

Each server has its own scratch directory as working directory, because coglet reads the input schema from
`.cog/openapi_schema.json` there. The project is on PYTHONPATH, so several servers can run at once.
"""

import json
import os
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
from pathlib import Path
from typing import IO, Any

from lib.errors import UserError
from lib.serving.client import health
from lib.serving.host import GRACE_SECONDS
from lib.serving.registry import (
    PROJECT,
    PredictorConfig,
    absolute_folders,
    find_predictor,
    local_environment,
)
from lib.serving.schema import write_schema

HEALTH_POLL_SECONDS = 0.05
COGLET_TARGET = b'"target":"coglet"'
# What coglet puts before the reason when setup() fails.
SETUP_FAILED = "Setup failed: "


class ServerError(RuntimeError):
    """The server did not start, or ended; the message holds its reason and the end of its log."""


def print_log(line: str) -> None:
    """Print a line to standard error: the default for a server's log."""
    print(line, file=sys.stderr, flush=True)


class Server:
    """A local server as a context manager: `with Server("t2v") as server: predict(server.url, {...})`.

    `predictor` is a name from the cog*.yaml files or a configuration. `mode` is "predict" or "train".
    `local_sources` lets requests name files of this machine. `on_log` receives every line that the
    predictor prints during setup, and with `prediction_logs` those of predictions too. Entering raises
    ServerError when the server does not become ready (within `timeout` seconds, if given).
    """

    def __init__(
        self,
        predictor: str | PredictorConfig,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        mode: str = "predict",
        local_sources: bool = False,
        environment: dict[str, str] | None = None,
        on_log: Callable[[str], None] = print_log,
        prediction_logs: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.config = find_predictor(predictor) if isinstance(predictor, str) else predictor
        self.host = host
        self.port = port or free_port(host)
        self.mode = mode
        self.local_sources = local_sources
        self.environment = environment or {}
        self.on_log = on_log
        self.prediction_logs = prediction_logs
        self.timeout = timeout
        self.log: deque[str] = deque(maxlen=1000)
        self.scratch: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._logged = threading.Event()
        """Set when coglet has logged something, such as that it accepts requests."""

    @property
    def url(self) -> str:
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    def __enter__(self) -> "Server":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process and wait until it is ready. Raises ServerError."""
        document = self.config.openapi()
        check_port(self.host, self.port)
        self.scratch = scratch = Path(tempfile.mkdtemp(prefix="cogvideox-server-"))
        write_schema(scratch / ".cog" / "openapi_schema.json", document)
        (scratch / "tmp").mkdir()
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lib.serving.host", str(scratch), self.host, self.mode],
            cwd=scratch,
            env=self._variables(scratch),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Its own group: Ctrl-C in the terminal reaches only the client, which then cancels and stops.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._relay_log, args=(process,), daemon=True)
        self._reader.start()
        self._wait_until_ready(process)

    def stop(self) -> None:
        """End the process and all its children, and remove the scratch directory. Safe to repeat.

        An interrupt while this waits for the server kills it, and is raised again.
        """
        process, self.process = self.process, None
        try:
            if process is not None:
                _pipe(process.stdin).close()  # the signal to end, see host.py
                process.wait(timeout=GRACE_SECONDS + 2)
        except subprocess.TimeoutExpired:
            print_log("the server did not stop in time and is killed")
        finally:
            if process is not None:
                _kill_group(process)
                process.wait()
                self._reader.join(timeout=2)
                _pipe(process.stdout).close()
            if self.scratch is not None:
                shutil.rmtree(self.scratch, ignore_errors=True)

    def wait(self) -> int:
        """Block until the process ends by itself, and return its exit status."""
        if self.process is None:
            raise RuntimeError("the server is not running")
        return self.process.wait()

    def _variables(self, scratch: Path) -> dict[str, str]:
        """Return the server's environment: this process's, the configuration's, and what coglet needs."""
        variables = dict(os.environ) | local_environment(self.config)
        variables |= absolute_folders(variables)
        # coglet starts its worker as plain `python`, which must be this interpreter.
        variables["PATH"] = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        )
        paths = [str(self.config.file.parent), str(PROJECT), os.environ.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(path for path in dict.fromkeys(paths) if path)
        variables["PYTHONUNBUFFERED"] = "1"
        variables["TMPDIR"] = str(scratch / "tmp")
        variables["PORT"] = str(self.port)
        variables["COG_PREDICT_TYPE_STUB"] = f"{self.config.predictor}:{self.config.class_name}"
        if self.config.train is not None:
            variables["COG_TRAIN_TYPE_STUB"] = f"{self.config.train}:{self.config.train_name}"
        if self.local_sources:
            variables["COGVIDEOX_LOCAL_SOURCES"] = "1"
        return variables | self.environment

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
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
        """Keep what the predictor prints and pass it on, for as long as the server runs."""
        for raw in iter(_pipe(process.stdout).readline, b""):
            if COGLET_TARGET in raw:
                self._logged.set()
            for line, in_prediction in _readable(raw):
                self.log.append(line)
                if self.prediction_logs or not in_prediction:
                    self.on_log(line)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raise UserError when the port cannot be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another port"
            ) from error


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
