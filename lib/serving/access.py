"""Decide who may call a server: the Host and Origin of a request, and the bearer token."""

import ipaddress
import secrets
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.errors import UserError
from lib.serving.refusals import RefusedError

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens on `host`."""
    if host.lower() in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token_for(host: str, token: str) -> None:
    """Raise UserError where other machines could reach a server without a token."""
    if not token and not is_loopback(host):
        raise UserError(
            f"--host {host} lets other machines in: set COGVIDEOX_API_TOKEN to a secret that callers must "
            "send, or use 127.0.0.1."
        )


class Access:
    """Passes on the requests of callers that may use the server, and answers the others with 401, 403 or 421.

    A page that a browser has open elsewhere can send requests to this machine. It cannot change their Host,
    Origin and Sec-Fetch-Site headers, so these are compared with the server's own names.

    Args:
        app: what to protect.
        host: the address on which the server listens.
        token: what callers must send as `Authorization: Bearer TOKEN`; empty for none.
        names: other host names of this server, for example a proxy's.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: str, names: frozenset[str] = frozenset()) -> None:
        self.app = app
        self.token = token.encode()
        self.names = LOOPBACK_NAMES | names | {host.lower(), socket.gethostname().lower()}
        self.local = is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(Headers(scope=scope))
        except RefusedError as error:
            await error.reply(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._is_own(host):
            message = f"{host[:200]!r} is not a name of this server; COGVIDEOX_API_HOSTS can add names"
            raise RefusedError(421, message)
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise RefusedError(403, f"requests from pages of {origin[:200]!r} are not accepted")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise RefusedError(403, "requests from pages of other sites are not accepted")
        if self.token and not self._has_token(headers.get("authorization", "")):
            message = "send `Authorization: Bearer TOKEN` with this server's COGVIDEOX_API_TOKEN"
            raise RefusedError(401, message, headers={"WWW-Authenticate": "Bearer"})

    def _is_own(self, host: str) -> bool:
        """Return whether a Host header names this server. Its port may be that of a tunnel."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        name = name.strip("[]").lower()
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # Names can be made to lead here by whoever owns them, addresses cannot.
        return address.is_loopback or not self.local

    def _has_token(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(token.strip().encode(), self.token)
