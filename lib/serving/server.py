"""A local server: the HTTP front that callers reach, and coglet behind it, started again when it fails."""

import socket
import sys
import threading
from collections import deque
from collections.abc import Callable

import uvicorn
from starlette.middleware import Middleware

from lib.errors import UserError
from lib.network.transport import Rules
from lib.network.urls import operator_rules, request_rules
from lib.serving.access import Access, check_token_for
from lib.serving.backend import Backend, ServerError, free_port
from lib.serving.front import EndedError, Front, Target
from lib.serving.registry import Mode, PredictorConfig, find_predictor
from lib.serving.webhooks import SECONDS as WEBHOOK_SECONDS
from lib.serving.webhooks import Webhooks
from lib.settings import current

WATCH_SECONDS = 0.5
STOP_SECONDS = 2
MAX_CONNECTIONS = 256
KINDS: dict[Mode, str] = {"predict": "predictions", "train": "trainings"}


def print_log(line: str) -> None:
    """Print a line to standard error: the default for a server's log."""
    print(line, file=sys.stderr, flush=True)


class Server:
    """A local server as a context manager: `with Server("t2v") as server: predict(server.url, {...})`.

    `predictor` is a name from the cog*.yaml files or a configuration. `mode` is "predict" or "train".
    `local_sources` lets requests name files of this machine. `on_log` receives every line that the
    predictor prints during setup, and with `prediction_logs` those of predictions too. Entering raises
    ServerError when the server does not become ready (within `timeout` seconds, if given), and UserError
    for a host and port that cannot be used.

    When the worker process dies, coglet is started again and the next request waits for that.
    """

    def __init__(
        self,
        predictor: str | PredictorConfig,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        mode: Mode = "predict",
        local_sources: bool = False,
        environment: dict[str, str] | None = None,
        on_log: Callable[[str], None] = print_log,
        prediction_logs: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.config = find_predictor(predictor) if isinstance(predictor, str) else predictor
        self.host = host
        self.port = port or free_port(host)
        self.mode: Mode = mode
        self.environment = ({"COGVIDEOX_LOCAL_SOURCES": "1"} if local_sources else {}) | (environment or {})
        self.on_log = on_log
        self.prediction_logs = prediction_logs
        self.timeout = timeout
        self.log: deque[str] = deque(maxlen=1000)
        self.backend: Backend | None = None
        self._ready = False
        self._starting = threading.Lock()
        """Held while a coglet is made, so that none is made once this server is stopped."""
        self._ended = threading.Event()
        self._stopping = threading.Event()
        self._failure = ""
        self._http: uvicorn.Server | None = None
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        """The address for callers on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

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
        """Start the server and wait until it is ready. Raises ServerError, and UserError."""
        check_token_for(self.host, current().api_token)
        listener = _listen(self.host, self.port)
        self._http = http = uvicorn.Server(self._http_config())
        self._run(lambda: http.run(sockets=[listener]))
        self._start_backend()
        self._run(self._watch)

    def stop(self) -> None:
        """End all processes and remove what they left. Safe to repeat.

        An interrupt while this waits for a prediction to end kills the processes, and is raised again.
        """
        with self._starting:
            self._stopping.set()
        try:
            if self.backend is not None:
                self.backend.stop()
        finally:
            if self._http is not None:
                self._http.should_exit = True
            for thread in self._threads:
                thread.join(STOP_SECONDS + 1)

    def wait(self) -> str:
        """Block until the server ends by itself, and return the reason."""
        self._ended.wait()
        return self._failure

    def _run(self, task: Callable[[], None]) -> None:
        thread = threading.Thread(target=task, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _http_config(self) -> uvicorn.Config:
        settings = current()
        access = Middleware(Access, host=self.host, token=settings.api_token, names=settings.api_hosts)
        front = Front(
            kind=KINDS[self.mode],
            url=self.url,
            target=self._target,
            webhooks=Webhooks(self._webhook_rules, self._log),
            access=access,
        )
        return uvicorn.Config(
            front.app,
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )

    def _webhook_rules(self) -> Rules:
        if self.environment.get("COGVIDEOX_LOCAL_SOURCES") == "1":
            return operator_rules()
        return request_rules(seconds=WEBHOOK_SECONDS)

    def _start_backend(self) -> None:
        with self._starting:
            if self._stopping.is_set():
                raise ServerError("the server is stopped")
            self.backend = backend = Backend(
                self.config,
                mode=self.mode,
                environment=self.environment,
                on_line=self._log_line,
                timeout=self.timeout,
            )
            backend.start()
        backend.wait_until_ready()
        self._ready = True

    def _target(self) -> Target | None:
        """Return the coglet to which requests go, None while it starts. Raises EndedError."""
        if self._ended.is_set():
            raise EndedError(self._failure)
        backend = self.backend
        if not self._ready or backend is None or backend.has_failed():
            return None
        return Target(url=backend.url, folder=backend.scratch / "predictions", lost=backend.fail)

    def _watch(self) -> None:
        """Start coglet again when its worker has died, until it ends by itself or this server is stopped."""
        while not self._stopping.wait(WATCH_SECONDS):
            backend = self.backend
            assert backend is not None, "started before this thread"
            status = backend.exit_status()
            if status is not None:
                self._end(f"the server ended with status {status}")
                return
            if not backend.has_failed():
                continue
            self._ready = False
            self._log("the worker process ended, for lack of memory or by a crash; starting it again ...")
            backend.stop()
            try:
                self._start_backend()
            except (ServerError, OSError) as error:
                self._end(str(error))
                return
            self._log("the worker process is ready again")

    def _end(self, reason: str) -> None:
        if not self._stopping.is_set():
            self._failure = reason
        self._ended.set()

    def _log_line(self, line: str, in_prediction: bool) -> None:
        if self.prediction_logs or not in_prediction:
            self._log(line)
        else:
            self.log.append(line)

    def _log(self, line: str) -> None:
        self.log.append(line)
        self.on_log(line)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on host and port. Raises UserError when that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); choose another port") from error
