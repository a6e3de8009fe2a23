"""HTTP as downloads and inputs need it: one GET, patience for a bad line, plain words for what went wrong."""

import functools
import http.client
import io
import math
import select
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

from lib.cancellation import check_stop
from lib.errors import UserError

ATTEMPTS = 4  # in a row without progress
BACKOFF_SECONDS = 1.0  # doubled after each failed attempt
STOP_POLL_SECONDS = 0.2
TRANSIENT = (OSError, http.client.HTTPException)
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class FetchError(UserError):
    """A URL that could not be fetched; `status` and `headers` are the host's when it answered."""

    def __init__(
        self, message: str, *, status: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class TruncatedError(http.client.HTTPException):
    """A body that ended before its announced length."""


class DeadlineError(TimeoutError):
    """A response that did not arrive whole within its total time."""


def shown(url: str) -> str:
    """Return `url` without user, password and query, which may be secrets, for messages and records."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(an address with a malformed host)"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}:{f'//{host}' if host else ''}{parts.path}".removeprefix(":")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may be read from addresses that strangers give, and for how long.

    `check_url` gets the URL and each URL that it redirects to, before anything is sent there; `check_peer`
    gets the IP address that was connected to, and its URL, before the request is sent. Both raise for what
    may not be read. Behind a proxy the peer is the proxy, which is not asked about. Headers and body of one
    response have `seconds` in all, and all responses together until `end`, by time.monotonic(). Reading
    raises Stopped soon after `stop` was set, even from a silent host.
    """

    check_url: Callable[[str], None]
    check_peer: Callable[[str, str], None]
    seconds: float
    stop: threading.Event | None = None
    end: float = math.inf


def until(stop: threading.Event | None) -> Rules | None:
    """Rules that allow everything, for as long as it takes, until `stop` is set."""
    if stop is None:
        return None
    return Rules(
        check_url=lambda url: None, check_peer=lambda address, url: None, seconds=math.inf, stop=stop
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where bytes come from: an http(s) URL, the headers to send, and the longest silence in seconds."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    timeout: float = 30.0
    rules: Rules | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise FetchError(f"{shown(self.url)[:200]!r} is not an http or https address.")

    @property
    def stop(self) -> threading.Event | None:
        return self.rules.stop if self.rules else None

    def open(self, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
        """Send the GET and return the response. Raises FetchError, or one of TRANSIENT worth trying again."""
        # Signed addresses come with their escapes; what people paste may hold blanks and umlauts.
        url = quote(self.url, safe="%/:?#[]@!$&'()*+,;=~")
        sent = {
            "User-Agent": "cogvideox-service",
            "Accept-Encoding": "identity",
            **self.headers,
            **(headers or {}),
        }
        handlers: list[urllib.request.BaseHandler] = [_Redirects(self.rules)]
        if self.rules:
            self.rules.check_url(self.url)
            handlers.append(_RuledConnections(self.rules))
        opener = urllib.request.build_opener(*handlers)
        try:
            return opener.open(urllib.request.Request(url, headers=sent), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in RETRIED_STATUS:
                raise
            raise self.failure(error) from error
        except http.client.InvalidURL as error:
            raise self.failure(error) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise self.failure(error) from error
            raise

    def failure(self, error: Exception, *, kept: str = "") -> FetchError:
        """Return the FetchError that names the address, the cause and what to do."""
        cause, remedy = _explain(error, self.timeout)
        status = error.code if isinstance(error, urllib.error.HTTPError) else None
        headers = error.headers if isinstance(error, urllib.error.HTTPError) else None
        return FetchError(
            f"Cannot download {shown(self.url)}: {cause}. {kept}{remedy}", status=status, headers=headers
        )


class Patience:
    """Counts failed attempts in a row, and waits longer after each."""

    def __init__(self, source: Source, stop: threading.Event | None = None) -> None:
        self.source = source
        self.failures = 0
        self.stop = stop or source.stop or threading.Event()

    def failed(self, error: Exception, *, progressed: bool = False) -> None:
        """Wait before the next attempt.

        Raises FetchError after ATTEMPTS failures without progress, and Stopped when the source was told to.
        """
        self.failures = 1 if progressed else self.failures + 1
        if self.failures >= ATTEMPTS:
            raise self.source.failure(error) from error
        self.stop.wait(BACKOFF_SECONDS * 2 ** (self.failures - 1))
        check_stop(self.source.stop)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def __init__(self, rules: Rules | None) -> None:
        self.rules = rules

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        fp.close()  # or urllib would read the body of the redirect, however long it is
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("https", old.scheme):
            raise FetchError(
                f"Cannot download {shown(req.full_url)}: it redirects to {shown(newurl)}, not to https. "
                "Check the address."
            )
        if self.rules:
            self.rules.check_url(newurl)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and new.netloc != old.netloc:
            # A token is for the host that it was given for, not for the storage that it redirects to.
            for name in ("Authorization", "Cookie"):
                request.remove_header(name)
        return request


class _RuledConnections(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.deadline = min(time.monotonic() + rules.seconds, rules.end)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(http.client.HTTPConnection, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(http.client.HTTPSConnection, req)

    def _open(
        self, kind: type[http.client.HTTPConnection], req: urllib.request.Request
    ) -> http.client.HTTPResponse:
        proxied = req.host != unquote(urlsplit(req.full_url).netloc)

        def make(host: str, **options: object) -> http.client.HTTPConnection:
            connection = kind(host, **options)  # type: ignore[arg-type]
            connect = connection.connect

            def connect_and_check() -> None:
                connect()
                # The name may lead elsewhere by now than when it was checked.
                if not proxied:
                    self.rules.check_peer(connection.sock.getpeername()[0], req.full_url)

            connection.connect = connect_and_check  # type: ignore[method-assign]
            connection.response_class = functools.partial(
                _TimedResponse, deadline=self.deadline, stop=self.rules.stop
            )
            return connection

        return self.do_open(make, req)


class _TimedResponse(http.client.HTTPResponse):
    """A response that has to arrive by `deadline`, whatever the pace of its bytes."""

    def __init__(
        self,
        sock: socket.socket,
        *args: object,
        deadline: float,
        stop: threading.Event | None,
        **options: object,
    ) -> None:
        super().__init__(sock, *args, **options)  # type: ignore[arg-type]
        self.fp = io.BufferedReader(_TimedRaw(self.fp.detach(), sock, deadline, stop))


class _TimedRaw(io.RawIOBase):
    def __init__(
        self, raw: io.RawIOBase, sock: socket.socket, deadline: float, stop: threading.Event | None
    ) -> None:
        self.raw, self.sock, self.deadline, self.stop = raw, sock, deadline, stop
        self.silence = sock.gettimeout() or float("inf")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:  # type: ignore[no-untyped-def]
        left = self.deadline - time.monotonic()
        if left > 0:
            self.sock.settimeout(min(self.silence, left))
            try:
                self._wait(min(self.silence, left))
                return self.raw.readinto(buffer)
            except TimeoutError:
                if time.monotonic() < self.deadline:
                    raise
        raise DeadlineError("the host is too slow: the whole did not arrive in the time allowed")

    def _wait(self, seconds: float) -> None:
        """Return when there is something to read or `seconds` are over; raise Stopped when told to."""
        if self.stop is None:
            return
        end = time.monotonic() + seconds
        ready = select.poll()
        ready.register(self.sock, select.POLLIN)
        # What TLS has decrypted already does not show on the socket.
        while not getattr(self.sock, "pending", int)() and time.monotonic() < end:
            check_stop(self.stop)
            if ready.poll(1000 * STOP_POLL_SECONDS):
                return

    def close(self) -> None:
        self.raw.close()
        super().close()


def _explain(error: Exception, timeout: float) -> tuple[str, str]:
    """Return what went wrong, and what the caller can do about it."""
    again = "Start again later."
    if isinstance(error, urllib.error.HTTPError):
        status = f"(HTTP {error.code})"
        if error.code in (404, 410):
            return f"the host has nothing at this address {status}", "Check the address."
        if error.code in (401, 403):
            return f"the host refuses access {status}", "Check the address and whether it needs a token."
        if error.code in RETRIED_STATUS:
            return f"the host is overloaded or failing {status}", again
        if 300 <= error.code < 400:
            return f"its redirects lead nowhere {status}", "Give the final address."
        return f"the host answered {error.code} {error.reason}", "Check the address."
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, (DeadlineError, TruncatedError)):
        return str(reason), again
    if isinstance(reason, TimeoutError):
        return f"the host sent nothing for {timeout:g} s", again
    if isinstance(reason, socket.gaierror):
        return "the host's name is not known", "Check the address and this machine's network."
    if isinstance(reason, ConnectionRefusedError):
        return "the host refuses the connection", "Check the address, or start again later."
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is not valid ({reason.verify_message})", "Check the address."
    if isinstance(reason, http.client.InvalidURL):
        return "the address is malformed", "Check the address."
    return f"the connection broke ({reason or type(reason).__name__})", again
