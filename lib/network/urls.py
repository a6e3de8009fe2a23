"""Which files and addresses a request may name, and reading a public address without being led inside.

Paths on the server's own disk, http:// and private addresses are for a server that only its owner reaches:
they need COGVIDEOX_LOCAL_SOURCES=1, which script/predict and the tests set.
"""

import http.client
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.network.http import TRANSIENT, FetchError, Patience, Rules, Source, TruncatedError, shown
from lib.storage.disk import disk_error, size_text

SILENCE_SECONDS = 30.0
TOTAL_SECONDS = 600.0  # a fetch holds the server's only slot: a byte now and then must not hold it for ever
BLOCK_BYTES = 256 << 10

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052
_COMPATIBLE = ipaddress.ip_network("::/96")  # RFC 4291, 2.5.5.1


def local_sources_allowed() -> bool:
    """Whether COGVIDEOX_LOCAL_SOURCES=1 was set."""
    return os.environ.get("COGVIDEOX_LOCAL_SOURCES") == "1"


def check_address(url: str) -> None:
    """Raise UserError unless this server may fetch the URL: https, and every address of its host public."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"{shown(url)[:200]!r} is not an address this service fetches; give an https:// one.")
    if local_sources_allowed():
        return
    if parts.scheme != "https":
        raise UserError(
            f"{shown(url)[:200]!r} is not encrypted; give an https:// address or upload the file."
        )
    if {"@", "%"} & set(parts.netloc):  # a host that two readers may read differently
        raise UserError(
            f"The host of {shown(url)[:200]!r} is not a plain name; give it without a user or escapes."
        )
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"The host of {shown(url)[:200]!r} cannot be found ({error}); check the address."
        ) from None
    for *_, address in found:
        check_public(address[0], url)


def check_public(address: str, url: str) -> None:
    """Raise UserError unless the IP address, and one that is embedded in it, is public; `url` led there."""
    ip = ipaddress.ip_address(address.split("%")[0])
    ip = _embedded(ip) or ip
    inner = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False)
    if inner or not ip.is_global:
        raise UserError(
            f"{shown(url)[:200]!r} leads to the private address {address}; only public ones are fetched."
        )


def open_url(url: str) -> http.client.HTTPResponse:
    """GET an allowed URL as a stream, checking every redirect and every connection before it is used.

    The caller closes the response, whose reading raises one of http.TRANSIENT when the line breaks or
    the whole takes longer than TOTAL_SECONDS. Raises UserError for an address that is not allowed, cannot
    be reached or does not answer with 2xx.
    """
    check_address(url)
    source = Source(url=url, timeout=SILENCE_SECONDS, rules=request_rules())
    try:
        return source.open()
    except TRANSIENT as error:
        raise source.failure(error) from error


def request_rules(*, stop: threading.Event | None = None, trusted: str | None = None) -> Rules:
    """What holds for addresses that a request names; below `trusted`, the operator's own, all is allowed."""

    def excepting(check: Callable[..., None]) -> Callable[..., None]:
        def checked(*arguments: str) -> None:
            if trusted is None or not arguments[-1].startswith(f"{trusted}/"):
                check(*arguments)

        return checked

    return Rules(
        check_url=excepting(check_address),
        check_peer=excepting(_check_peer),
        seconds=TOTAL_SECONDS,
        stop=stop,
    )


def operator_rules(*, stop: threading.Event | None = None) -> Rules:
    """What holds for addresses that the server's owner set: anything, in the time that a request has."""
    return Rules(
        check_url=lambda url: None, check_peer=lambda address, url: None, seconds=TOTAL_SECONDS, stop=stop
    )


def save_url(
    url: str, target: Path, *, max_bytes: int, rules: Rules, headers: Mapping[str, str] | None = None
) -> Path:
    """Write what is at a URL to the new file `target` and return it; nothing is left unless it came whole.

    A line that breaks is tried again, all within rules.seconds. Raises FetchError, also for more than
    `max_bytes`, Stopped, and NoSpaceError.
    """
    source = Source(url=url, headers=dict(headers or {}), timeout=SILENCE_SECONDS, rules=rules)
    patience = Patience(source, rules.stop)
    end = time.monotonic() + rules.seconds
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            if rules.stop is not None and rules.stop.is_set():
                raise Stopped
            left = replace(rules, seconds=max(end - time.monotonic(), 0.1))
            try:
                with replace(source, rules=left).open() as response:
                    return _save(response, target, max_bytes=max_bytes, source=source)
            except TRANSIENT as error:
                if time.monotonic() >= end:
                    raise source.failure(error) from error
                patience.failed(error)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _save(response: http.client.HTTPResponse, target: Path, *, max_bytes: int, source: Source) -> Path:
    at, announced = 0, response.length
    with _opened(target) as file:
        while True:
            if max(at, announced or 0) > max_bytes:
                raise FetchError(
                    f"Cannot download {shown(source.url)}: it is larger than the {size_text(max_bytes)} "
                    "that are allowed. Use a smaller file."
                )
            block = response.read1(BLOCK_BYTES)
            if not block:
                break
            try:
                file.write(block)
            except OSError as error:
                raise disk_error(error, target) from error  # not to be taken for a fault of the line
            at += len(block)
    if response.length:
        raise TruncatedError(f"the connection ended {response.length:,} bytes early")
    return target


def _opened(target: Path):  # type: ignore[no-untyped-def]
    try:
        return target.open("wb", buffering=0)
    except OSError as error:
        raise disk_error(error, target) from error


def _check_peer(address: str, url: str) -> None:
    if not local_sources_allowed():
        check_public(address, url)


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for, where a gateway or the kernel may translate it."""
    if isinstance(ip, ipaddress.IPv4Address):
        return None
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1):  # :: and ::1 have meanings of their own
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour
