"""Talks to a Cog server over HTTP with the standard library alone.

A prediction is one synchronous PUT: closing the connection cancels it, and the reply is the result. While
it runs, its log is read by repeating the PUT with an input that is not an object: coglet answers with the
state so far while that id is running, and otherwise refuses with 422, so a poll can never start anything.
"""

import http.client
import json
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from lib.errors import UserError

POLL_SECONDS = 0.25
CANCEL_SECONDS = 20.0
QUICK_SECONDS = 10.0
# coglet frees its slot a moment after it has replied: a refusal so soon after a result is tried again.
BUSY_SECONDS = 1.0
# UserError and those made of it: their messages are written for the caller and need no name before them.
OURS = ("UserError", "FetchError", "NoSpaceError", "NoRepositoryError")


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
    """Runs one prediction on the server at `url` and returns its reply (`output`, `metrics`, `logs`).

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
            # If the server cannot be told, the closing connection tells it.
            with suppress(OSError, http.client.HTTPException):
                request(url, "POST", f"{path}/cancel", timeout=QUICK_SECONDS)
            call.done.wait(CANCEL_SECONDS)
        raise
    return reply


def health(url: str) -> dict[str, Any]:
    """The server's health-check; `{}` while nothing answers."""
    try:
        status, body = request(url, "GET", "/health-check", timeout=QUICK_SECONDS)
    except (OSError, http.client.HTTPException):
        return {}
    return json.loads(body) if status == 200 else {}


def wait_until_idle(url: str, *, seconds: float = 15.0) -> None:
    """Returns when the server at `url` is ready for a request. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while (status := health(url).get("status")) != "READY":
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} is {status} after {seconds:g} s")
        time.sleep(0.05)


def fetch_schema(url: str) -> dict[str, Any]:
    """The server's /openapi.json. Raises UserError when there is no Cog server or it has no schema."""
    try:
        status, body = request(url, "GET", "/openapi.json", timeout=QUICK_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"no server answers at {url}: {error}") from error
    if status != 200:
        raise UserError(f"{url} gives no input schema: {status} {_message(body)}")
    return json.loads(body)


def request(
    url: str, method: str, path: str, body: Any = None, *, timeout: float | None = None
) -> tuple[int, bytes]:
    """One HTTP request with a JSON body: `(status, body)`. Raises OSError or HTTPException.

    Proxy settings of the environment are not used: these servers are addressed directly.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url} is not a server's address; write http://host:port")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    try:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, parts.path.rstrip("/") + path, content, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


class _Call(threading.Thread):
    """The synchronous PUT, in a thread so that the caller can read the log and be interrupted."""

    def __init__(self, url: str, path: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.arguments = (url, "PUT", path, body)
        self.reply: tuple[int, bytes] | None = None
        self.error: Exception | None = None
        # Not join() and is_alive(): in Python 3.11 an interrupted join takes the thread for ended.
        self.done = threading.Event()

    def run(self) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        try:
            self.reply = request(*self.arguments)
            while self.reply[0] == 409 and time.monotonic() < deadline:
                time.sleep(0.1)
                self.reply = request(*self.arguments)
        except Exception as error:  # raised again in result(), in the caller's thread
            self.error = error
        finally:
            self.done.set()

    def result(self) -> dict[str, Any]:
        if isinstance(self.error, OSError | http.client.HTTPException):
            raise PredictionError(f"lost the server at {self.arguments[0]}: {self.error}") from self.error
        if self.error is not None:
            raise self.error
        status, body = self.reply
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
    except (OSError, http.client.HTTPException):
        return ""  # the PUT itself tells what happened to the server
    return json.loads(body).get("logs", "") if status == 202 else ""


def _message(body: bytes) -> str:
    """A refusal in plain words: `num_inference_steps: 501 is greater than the maximum of 500`."""
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
    """The predictor's own sentence, without coglet's prefixes and the names of our error classes."""
    while text.startswith("Prediction failed: ") or text.startswith("Training failed: "):
        text = text.partition(": ")[2]
    name, _, sentence = text.partition(": ")
    return sentence if name in OURS else text
