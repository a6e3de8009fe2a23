"""Check the addresses in a request: https only, and no private addresses.

COGVIDEOX_LOCAL_SOURCES=1 also allows http://, private addresses and paths on the server's disk. It is for
servers that only their owner can reach; script/predict and the tests set it.
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx2

from lib.errors import UserError, shown
from lib.network.http import is_web_address, without_secrets
from lib.network.transport import Rules
from lib.settings import current

TOTAL_SECONDS = 600.0  # a fetch occupies the server's only slot

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's platform, reachable from every machine there
        "192.0.0.0/24",  # RFC 6890, IETF protocols
        "192.88.99.0/24",  # RFC 7526, relays of 6to4
        "64:ff9b:1::/48",  # RFC 8215, local translation
        "2001::/32",  # RFC 4380, Teredo
    )
]
"""Addresses that are not for everyone, though Python's ipaddress calls some of them global."""
_COMPATIBLE = ipaddress.ip_network("::/96")  # RFC 4291, 2.5.5.1


def check_address(url: str) -> None:
    """Raise UserError unless this server may fetch the URL: https, and every address of its host public."""
    shown = repr(without_secrets(url)[:200])
    if not is_web_address(url):
        raise UserError(f"{shown} is not an address this service fetches; give an https:// one.")
    if current().local_sources:
        return
    parts = urlsplit(url)
    if parts.scheme != "https":
        raise UserError(f"{shown} is not encrypted; give an https:// address or upload the file.")
    if {"@", "%"} & set(parts.netloc):  # URL parsers disagree about these
        raise UserError(f"The host of {shown} is not a plain name; give it without a user or escapes.")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"The host of {shown} cannot be found ({error}); check the address.") from None
    for *_, address in found:
        check_public(str(address[0]), url)


def check_public(address: str, url: str) -> None:
    """Raise UserError unless the IP address to which `url` leads is public, or local sources are allowed."""
    ip = ipaddress.ip_address(address.split("%")[0])
    ip = _embedded(ip) or ip
    internal = ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False) or not ip.is_global
    internal = internal or any(ip in network for network in _NOT_PUBLIC)
    if internal and not current().local_sources:
        raise UserError(
            f"{shown(without_secrets(url))} leads to the private address {address}; only public ones are "
            "fetched."
        )


def request_rules(
    *, stop: threading.Event | None = None, trusted: str | None = None, seconds: float | None = None
) -> Rules:
    """Return the rules for addresses that a request names; the fetch has to end within `seconds`.

    Everything below `trusted`, an address that the operator chose, is allowed.
    """

    def unless_trusted(check: Callable[..., None]) -> Callable[..., None]:
        def checked(*arguments: str) -> None:
            if trusted is None or not _is_below(arguments[-1], trusted):
                check(*arguments)

        return checked

    return Rules(
        check_url=unless_trusted(check_address),
        check_peer=unless_trusted(check_public),
        end=time.monotonic() + (TOTAL_SECONDS if seconds is None else seconds),
        stop=stop,
    )


def _is_below(url: str, trusted: str) -> bool:
    try:
        # As it is sent: without a default port, dot segments or upper case in the host.
        return str(httpx2.URL(url)).startswith(f"{httpx2.URL(trusted)}/")
    except httpx2.InvalidURL:
        return False


def operator_rules(*, stop: threading.Event | None = None) -> Rules:
    """Return the rules for addresses that the operator chose: all are allowed, within TOTAL_SECONDS."""
    return Rules(end=time.monotonic() + TOTAL_SECONDS, stop=stop)


def _embedded(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 address stands for where a gateway or the kernel translates it."""
    if isinstance(ip, ipaddress.IPv4Address):
        return None
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1):  # :: and ::1 have meanings of their own
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour
