"""Which files and addresses a request may name, and reading a public address without being led inside.

Paths on the server's own disk, http:// and private addresses are for a server that only its owner reaches:
they need COGVIDEOX_LOCAL_SOURCES=1, which script/predict and the tests set.
"""

import ipaddress
import os
import socket
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from lib.errors import UserError

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 5
CONNECT_SECONDS, READ_SECONDS = 10, 30


def local_sources_allowed() -> bool:
    """Whether COGVIDEOX_LOCAL_SOURCES=1 was set."""
    return os.environ.get("COGVIDEOX_LOCAL_SOURCES") == "1"


def check_address(url: str) -> None:
    """Raise UserError unless this server may fetch the URL: https, and every address of its host public."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url!r} is not an address this service fetches; give an https:// one.")
    if local_sources_allowed():
        return
    if parts.scheme != "https":
        raise UserError(f"{url!r} is not encrypted; give an https:// address or upload the file.")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"The host of {url!r} cannot be found ({error}); check the address.") from None
    for *_, address in found:
        _check_public(address[0], url)


def open_url(url: str) -> "requests.Response":
    """GET an allowed URL as a stream, checking every redirect before it is followed.

    Raises UserError for an address that is not allowed, cannot be reached or does not answer with 2xx.
    """
    import requests

    for _ in range(MAX_REDIRECTS + 1):
        check_address(url)
        try:
            response = requests.get(
                url, stream=True, allow_redirects=False, timeout=(CONNECT_SECONDS, READ_SECONDS)
            )
        except requests.RequestException as error:
            raise UserError(f"{url!r} cannot be fetched: {error}.") from None
        if response.is_redirect:
            url = urljoin(url, response.headers["location"])
            response.close()
            continue
        if not response.ok:
            response.close()
            raise UserError(f"{url!r} cannot be fetched: the host answers {response.status_code}.")
        return response
    raise UserError(f"{url!r} redirects more than {MAX_REDIRECTS} times; give the final address.")


def _check_public(address: str, url: str) -> None:
    if not ipaddress.ip_address(address.split("%")[0]).is_global:
        raise UserError(f"{url!r} leads to the private address {address}; only public ones are fetched.")
