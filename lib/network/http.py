"""The HTTP client: GET with limits, retries and plain error messages.

read(Source(url=...))            a small document
save(Source(url=...), target)    a body as a file, in one stream
download.fetch(url, target)      a large file: in parallel ranges, resumed, verified
"""

import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

import httpcore2
import httpx2

from lib.cancellation import check_stop
from lib.errors import UserError, cut, shown
from lib.network.transport import ANYTHING, Rules, Transport
from lib.storage.disk import disk_error, size_text

ATTEMPTS = 4  # in a row without progress
BACKOFF_SECONDS = 1.0  # doubled after each failed attempt
SILENCE_SECONDS = 30.0
MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
CHECK, AGAIN = "Check the address.", "Start again later."
REFUSALS = {
    **dict.fromkeys((404, 410), ("the host has nothing at this address", CHECK)),
    **dict.fromkeys((401, 403), ("the host refuses access", f"{CHECK[:-1]} and whether it needs a token.")),
}
BROKEN = (
    httpcore2.NetworkError,
    httpcore2.TimeoutException,
    httpcore2.ProtocolError,
    httpcore2.ProxyError,
    httpcore2.UnsupportedProtocol,
    httpx2.InvalidURL,
)
"""Errors of the transport when a request cannot be sent or a body does not arrive."""

T = TypeVar("T")


class FetchError(UserError):
    """A URL that could not be fetched; `status` and `headers` are the host's when it answered."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.transient = transient
        """Whether another attempt may succeed."""


def without_secrets(url: str) -> str:
    """Return `url` without user, password and query, for messages and records."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(an address with a malformed host)"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}:{f'//{host}' if host else ''}{parts.path}".removeprefix(":")


def is_web_address(url: str) -> bool:
    """Return whether `url` is an http or https URL with a host."""
    try:
        parts = urlsplit(url)
        return bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to request: an http(s) URL and headers, with the limits that apply."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    max_bytes: int = sys.maxsize
    timeout: float = SILENCE_SECONDS
    """The longest silence of the host."""
    rules: Rules = ANYTHING

    def __post_init__(self) -> None:
        if not is_web_address(self.url):
            raise FetchError(f"{shown(without_secrets(self.url))} is not an http or https address.")

    @contextmanager
    def get(self, headers: Mapping[str, str] | None = None) -> Iterator[httpx2.Response]:
        """Send a GET and yield the 2xx response, unread. Raises FetchError, also while the body is read."""
        response = None
        try:
            transport = Transport(self.rules)
            client = httpx2.Client(transport=transport, timeout=self.timeout, trust_env=False)
            with client, closing(self._follow(client, {**self.headers, **(headers or {})})) as response:
                if not response.is_success:
                    raise self._refused(response)
                self._check_encoding(response)
                self.check_size(int(response.headers.get("Content-Length", 0)))
                yield response
        except BROKEN as error:
            raise self._broken(error, response) from error

    def error(self, cause: str, remedy: str, **options: object) -> FetchError:
        """Return the FetchError that names the address, the cause and what to do."""
        message = f"Cannot download {cut(without_secrets(self.url))}: {cause}. {remedy}"
        return FetchError(message, **options)  # pyright: ignore[reportArgumentType] # as FetchError's own

    def check_size(self, count: int) -> None:
        """Raise FetchError for a body of more than `max_bytes`."""
        if count > self.max_bytes:
            limit = size_text(self.max_bytes)
            raise self.error(f"it is larger than the {limit} that are allowed", "Use a smaller file.")

    def _check_encoding(self, response: httpx2.Response) -> None:
        """Raise FetchError for a compressed body: it was not asked for, and may unpack to any size."""
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            cause = f"the host compresses it ({cut(encoding)}), although it was asked not to"
            raise self.error(cause, "Give an address that serves the file as it is.")

    def _follow(self, client: httpx2.Client, headers: Mapping[str, str]) -> httpx2.Response:
        url = self.url
        sent = {
            "User-Agent": "cogvideox-service",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **headers,
        }
        for hop in range(MAX_REDIRECTS + 1):
            self.rules.check_url(url)
            response = client.send(client.build_request("GET", url, headers=sent), stream=True)
            location = response.headers.get("Location")
            if response.status_code not in REDIRECTS or not location or hop == MAX_REDIRECTS:
                return response
            response.close()
            try:
                target = urljoin(url, location)
                old, new = urlsplit(url), urlsplit(target)
            except ValueError:
                raise self.error("it redirects to a malformed address", CHECK) from None
            if new.scheme not in ("https", old.scheme):
                raise self.error(f"it redirects to {cut(without_secrets(target))}, not to https", CHECK)
            if new.netloc != old.netloc:
                # A token is for the host that it was given for, not for the storage that it redirects to.
                sent = {k: v for k, v in sent.items() if k.lower() not in ("authorization", "cookie")}
            url = target
        raise AssertionError("the last hop returns")

    def _refused(self, response: httpx2.Response) -> FetchError:
        code = response.status_code
        cause, remedy = REFUSALS.get(code, (f"the host answered {response.reason_phrase}", CHECK))
        if code in RETRIED_STATUS:
            cause, remedy = "the host is overloaded or failing", AGAIN
        elif 300 <= code < 400:
            cause, remedy = "its redirects lead nowhere", "Give the final address."
        return self.error(
            f"{cause} (HTTP {code})",
            remedy,
            status=code,
            headers=response.headers,
            transient=code in RETRIED_STATUS,
        )

    def _broken(self, error: Exception, response: httpx2.Response | None) -> FetchError:
        cause = next(iter(error.args), None)  # of a socket's failure its OSError
        length = int(response.headers.get("Content-Length", 0)) if response else 0
        if time.monotonic() >= self.rules.end:
            return self.error("the host is too slow: not everything arrived in the time allowed", AGAIN)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return self.error(f"its certificate is not valid ({cause.verify_message})", CHECK)
        if isinstance(error, (httpx2.InvalidURL, httpcore2.UnsupportedProtocol)):
            return self.error("the address is malformed", CHECK)
        problem, remedy = f"the connection broke ({str(error) or type(error).__name__})", AGAIN
        if isinstance(error, httpcore2.TimeoutException):
            problem = f"the host sent nothing for {self.timeout:g} s"
        elif isinstance(cause, socket.gaierror):
            problem, remedy = "the host's name is not known", "Check the address and this machine's network."
        elif isinstance(cause, ConnectionRefusedError):
            problem, remedy = "the host refuses the connection", "Check the address, or start again later."
        elif response and response.num_bytes_downloaded < length:
            problem = f"the connection ended after {response.num_bytes_downloaded:,} of {length:,} bytes"
        return self.error(problem, remedy, transient=True)


def retry(
    source: Source,
    attempt: Callable[[], T],
    *,
    stop: threading.Event | None = None,
    progressed: Callable[[], bool] = lambda: False,
) -> T:
    """Return what `attempt` returns, repeated after transient errors with growing pauses.

    Raises the last FetchError after ATTEMPTS failures in a row without progress, and Stopped when the source
    is stopped. `stop` also ends a pause.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except FetchError as error:
            failures = 1 if progressed() else failures + 1
            if not error.transient or failures >= ATTEMPTS:
                raise
        (stop or source.rules.stop or threading.Event()).wait(BACKOFF_SECONDS * 2 ** (failures - 1))
        check_stop(source.rules.stop)


def copy_body(
    response: httpx2.Response,
    file: BinaryIO,
    *,
    start: int = 0,
    end: int,
    moved: Callable[[int], None] | None = None,
) -> bool:
    """Write a body to `file` from byte `start` on; `moved` is called with each new position.

    Returns whether the body stayed within `end`, past which nothing is written. Raises OSError when the disk
    refuses.
    """
    for block in response.iter_raw():
        if start + len(block) > end:
            return False
        while block:
            written = os.pwrite(file.fileno(), block, start)
            start, block = start + written, block[written:]
        if moved:
            moved(start)
    return True


def save(source: Source, target: Path, *, moved: Callable[[int], None] | None = None) -> Path:
    """Write a body to the file `target` and return it; nothing is left there unless it is complete.

    `moved` is called with each new position. Raises FetchError, NoSpaceError, and Stopped.
    """

    def attempt() -> None:
        with source.get() as response, open(target, "wb", buffering=0) as file:
            if not copy_body(response, file, end=source.max_bytes, moved=moved):
                source.check_size(source.max_bytes + 1)
            os.fdatasync(file.fileno())

    complete = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        retry(source, attempt)
        complete = True
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        if not complete:
            target.unlink(missing_ok=True)
    return target


def read(source: Source) -> bytes:
    """Return a small document. Raises FetchError, and Stopped."""

    def attempt() -> bytes:
        body = b""
        with source.get() as response:
            for block in response.iter_raw():
                body += block
                source.check_size(len(body))
        return body

    return retry(source, attempt)
