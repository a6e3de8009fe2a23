"""A client for Cog servers.

A prediction is one synchronous PUT: closing the connection cancels it, and the reply is the result. While it
runs, its log is read by repeating the PUT with an input that is not an object: coglet answers with the state
so far while a prediction with that id is running, and refuses with 422 otherwise, so polling starts nothing.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2

from lib.errors import UserError
from lib.settings import current

POLL_SECONDS = 0.25
CANCEL_SECONDS = 20.0
QUICK_SECONDS = 10.0
# coglet frees its slot shortly after it has replied: a request refused so soon is retried.
BUSY_SECONDS = 1.0
# UserError and its subclasses: their messages are written for the caller and need no class name.
CALLER_ERRORS = ("UserError", "FetchError", "NoSpaceError", "NoRepositoryError", "TimeLimitError")


class PredictionError(RuntimeError):
    """The server refused the request or the prediction failed; the message is the server's."""


class Canceled(RuntimeError):
    """The prediction was cancelled."""


def predict(
    url: str,
    inputs: dict[str, Any],
    *,
    on_logs: Callable[[str], None] | None = None,
    kind: str = "predictions",
) -> dict[str, Any]:
    """Run one prediction on the server at `url` and return its reply (`output`, `metrics`, `logs`).

    `on_logs` receives the whole log so far, several times a second. Ctrl-C, or any other exception in
    `on_logs`, cancels the prediction, waits for that to take effect, and is raised again. Raises
    PredictionError with the server's message, or Canceled if someone else cancelled it.
    """
    path = f"/{kind}/{secrets.token_hex(13)}"
    call = _Call(url, path, {"input": inputs})
    call.start()
    try:
        while not call.done.wait(POLL_SECONDS):
            if on_logs:
                on_logs(_logs_so_far(url, path))
        reply = call.result()
        if on_logs:
            on_logs(reply.get("logs", ""))
    except BaseException:
        if not call.done.is_set():
            # If this request fails too, the closing connection cancels the prediction.
            with suppress(httpx2.HTTPError):
                request(url, "POST", f"{path}/cancel", timeout=QUICK_SECONDS)
            call.done.wait(CANCEL_SECONDS)
        raise
    return reply


def health(url: str) -> dict[str, Any]:
    """Return the server's health check; `{}` while nothing answers."""
    try:
        status, body = request(url, "GET", "/health-check", timeout=QUICK_SECONDS)
    except httpx2.HTTPError:
        return {}
    return json.loads(body) if status == 200 else {}


def fetch_schema(url: str) -> dict[str, Any]:
    """Return the server's /openapi.json. Raises UserError when there is no Cog server or it has no schema."""
    try:
        status, body = request(url, "GET", "/openapi.json", timeout=QUICK_SECONDS)
    except httpx2.HTTPError as error:
        raise UserError(f"no server answers at {url}: {error}") from error
    if status != 200:
        raise UserError(f"{url} gives no input schema: {status} {_message(body)}")
    return json.loads(body)


def request(
    url: str, method: str, path: str, body: Any = None, *, timeout: float | None = None
) -> tuple[int, bytes]:
    """Send one HTTP request with a JSON body and return `(status, body)`. Raises httpx2.HTTPError.

    COGVIDEOX_API_TOKEN is sent where it is set. Proxy settings of the environment are not used: these servers
    are addressed directly.
    """
    verify = url.startswith("https:")  # loading the certificates takes 40 ms, and http needs none
    # Not httpx2's own JSON, which cannot send the surrogates of arguments that are not UTF-8.
    content = None if body is None else json.dumps(body)
    headers = {} if body is None else {"Content-Type": "application/json"}
    if token := current().api_token:
        headers["Authorization"] = f"Bearer {token}"
    address = url.rstrip("/") + path
    options = {"timeout": timeout, "trust_env": False, "verify": verify}
    try:
        reply = httpx2.request(method, address, content=content, headers=headers, **options)
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise UserError(f"{url} is not a server's address; write http://host:port") from error
    return reply.status_code, reply.content


class _Call(threading.Thread):
    """The synchronous PUT, in a thread so that the caller can read the log and be interrupted."""

    def __init__(self, url: str, path: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.path, self.body = url, path, body
        self.outcome: tuple[int, bytes] | Exception | None = None
        # Not join() and is_alive(): in Python 3.11 an interrupted join marks the thread as ended.
        self.done = threading.Event()

    def run(self) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        try:
            while True:
                self.outcome = status, _ = request(self.url, "PUT", self.path, self.body)
                if status != 409 or time.monotonic() > deadline:
                    break
                time.sleep(0.1)
        except Exception as error:  # raised again in result(), in the caller's thread
            self.outcome = error
        finally:
            self.done.set()

    def result(self) -> dict[str, Any]:
        if isinstance(self.outcome, httpx2.HTTPError):
            raise PredictionError(f"lost the server at {self.url}: {self.outcome}") from self.outcome
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None, "only called once done"
        status, body = self.outcome
        if status != 200:
            raise PredictionError(_message(body))
        reply = json.loads(body)
        if reply["status"] == "canceled":
            raise Canceled("the prediction was cancelled")
        if reply["status"] != "succeeded":
            raise PredictionError(_plain_error(reply.get("error") or f"status {reply['status']}"))
        return reply


def _logs_so_far(url: str, path: str) -> str:
    try:
        status, body = request(url, "PUT", path, {"input": []}, timeout=QUICK_SECONDS)
    except httpx2.HTTPError:
        return ""  # the prediction's own PUT fails with the reason
    return json.loads(body).get("logs", "") if status == 202 else ""


def _message(body: bytes) -> str:
    """Return a refusal in plain words: `num_inference_steps: 501 is greater than the maximum of 500`."""
    text = body.decode(errors="replace").strip()
    try:
        document = json.loads(text)
    except ValueError:
        return text
    details = document.get("detail")
    if isinstance(details, list):
        return "\n".join(_detail(item) for item in details)
    return _plain_error(document.get("error") or details or text)


def _detail(item: dict[str, Any]) -> str:
    place = [str(part) for part in item["loc"] if part not in ("body", "input", "__root__")]
    return ": ".join([".".join(place), item["msg"]]) if place else item["msg"]


def _plain_error(text: str) -> str:
    """Return the predictor's message, without coglet's prefixes and the names of our error classes."""
    while text.startswith(("Prediction failed: ", "Training failed: ")):
        text = text.partition(": ")[2]
    name, _, sentence = text.partition(": ")
    return sentence if name in CALLER_ERRORS else text
