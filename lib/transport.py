"""HTTP as the downloads need it: one GET with patience for a bad line and plain words for what went wrong."""

import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from lib.errors import UserError

ATTEMPTS = 4  # in a row without progress
BACKOFF_SECONDS = 1.0  # doubled after each failed attempt
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


def shown(url: str) -> str:
    """Return `url` without user, password and query, which may be secrets, for messages and records."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where bytes come from: an http(s) URL, the headers to send, and the longest silence in seconds."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    timeout: float = 30.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise FetchError(f"{self.url[:200]!r} is not an http or https address.")

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
        opener = urllib.request.build_opener(_Redirects)
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
        self.stop = stop or threading.Event()

    def failed(self, error: Exception, *, progressed: bool = False) -> None:
        """Wait before the next attempt. Raises FetchError after ATTEMPTS failures without progress."""
        self.failures = 1 if progressed else self.failures + 1
        if self.failures >= ATTEMPTS:
            raise self.source.failure(error) from error
        self.stop.wait(BACKOFF_SECONDS * 2 ** (self.failures - 1))


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("https", old.scheme):
            raise FetchError(
                f"Cannot download {shown(req.full_url)}: it redirects to {shown(newurl)}, not to https. "
                "Check the address."
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and new.netloc != old.netloc:
            # A token is for the host that it was given for, not for the storage that it redirects to.
            for name in ("Authorization", "Cookie"):
                request.remove_header(name)
        return request


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
        return f"the host answered {error.code} {error.reason}", "Check the address."
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
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
    if isinstance(reason, TruncatedError):
        return str(reason), again
    return f"the connection broke ({reason or type(reason).__name__})", again
