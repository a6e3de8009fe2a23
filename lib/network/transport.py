"""Connections of the HTTP client: peers are checked first, and waits end at a deadline or a stop event."""

import select
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import inf
from threading import Event
from typing import Any

import httpcore2
import httpx2

from lib.cancellation import check_stop
from lib.errors import UserError

STOP_POLL_SECONDS = 0.2
READ_BYTES = 256 << 10  # four times what httpcore asks for: a fifth less work for each byte


def _accept(*_: str) -> None:
    """Accept any URL or peer."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which addresses may be reached, and for how long."""

    check_url: Callable[[str], None] = _accept
    """Called with each URL, also those of redirects, before a connection is made; raises to refuse it."""
    check_peer: Callable[[str, str], None] = _accept
    """Called with the IP address of each connection, and the URL, before anything is sent; raises to refuse
    it. Behind a proxy the peer is the proxy, which is not checked."""
    end: float = inf
    """The time.monotonic() by which everything has to be done."""
    stop: Event | None = None
    """Reading raises Stopped soon after this is set, even from a silent host."""

    def limit(self, timeout: float | None) -> float:
        """Return the seconds that one operation may take. Raises ReadTimeout after `end`."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout
        return min(left, inf if timeout is None else timeout)


ANYTHING = Rules()
"""Rules for addresses that the operator chose: no limits."""


class Transport(httpx2.BaseTransport):
    """Sends each request over a connection of its own, under `rules`, through the environment's proxies."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        pool = _pool(request.url, self._rules)
        try:
            url = request.url
            target = httpcore2.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            )
            response = pool.handle_request(
                httpcore2.Request(
                    request.method,
                    target,
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        except BaseException:
            pool.close()
            raise
        return httpx2.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response, pool),
            extensions=response.extensions,
        )


class _Body(httpx2.SyncByteStream):
    def __init__(self, response: httpcore2.Response, pool: httpcore2.ConnectionPool) -> None:
        self._response, self._pool = response, pool

    def __iter__(self) -> Iterator[bytes]:
        return self._response.iter_stream()

    def close(self) -> None:
        self._response.close()
        self._pool.close()


def _pool(url: httpx2.URL, rules: Rules) -> httpcore2.ConnectionPool:
    address = urllib.request.getproxies().get(url.scheme)
    if not address or urllib.request.proxy_bypass(url.netloc.decode()):
        backend = _Backend(rules, lambda peer: rules.check_peer(peer, str(url)))
        return httpcore2.ConnectionPool(ssl_context=_ssl_context(), network_backend=backend)
    try:
        proxy = httpx2.Proxy(address if "://" in address else f"http://{address}")
        if not proxy.url.host or proxy.url.scheme not in ("http", "https"):
            raise ValueError
        return httpcore2.HTTPProxy(
            proxy_url=str(proxy.url),
            proxy_auth=proxy.raw_auth,
            ssl_context=_ssl_context(),
            network_backend=_Backend(rules, _accept),
        )
    except (ValueError, httpx2.InvalidURL):
        variable = f"{url.scheme}_proxy"
        raise UserError(f"{variable} is not the address of an http or https proxy; correct it.") from None


@cache
def _ssl_context() -> ssl.SSLContext:
    return ssl.create_default_context()  # which honours SSL_CERT_FILE and takes 20 ms to make


class _Backend(httpcore2.SyncBackend):
    """Connects, and has the peer's address checked before TLS begins and before anything is sent."""

    def __init__(self, rules: Rules, check_peer: Callable[[str], None]) -> None:
        self._rules, self._check_peer = rules, check_peer

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        limit = self._rules.limit(timeout)
        stream = super().connect_tcp(host, port, limit, local_address, socket_options)
        try:
            # The name may lead to another address than when it was checked.
            self._check_peer(stream.get_extra_info("server_addr")[0])
        except BaseException:
            stream.close()
            raise
        return _Stream(stream, self._rules)


class _Stream(httpcore2.NetworkStream):
    """A connection whose every operation is limited by `rules`."""

    def __init__(self, stream: httpcore2.NetworkStream, rules: Rules) -> None:
        self._stream, self._rules = stream, rules

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._wait(self._rules.limit(timeout))
        return self._stream.read(max(max_bytes, READ_BYTES), self._rules.limit(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._rules.limit(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, self._rules.limit(timeout))
        return _Stream(stream, self._rules)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def _wait(self, seconds: float) -> None:
        """Return when there is something to read. Raises ReadTimeout after `seconds`, and Stopped."""
        if self._rules.stop is None:
            return
        socket, tls = self.get_extra_info("socket"), self.get_extra_info("ssl_object")
        if tls is not None and not isinstance(socket, ssl.SSLSocket):
            return  # TLS to an https proxy around TLS: what is buffered between the two cannot be seen
        end = time.monotonic() + seconds
        ready = select.poll()
        ready.register(socket, select.POLLIN)
        # What TLS has decrypted already does not show on the socket.
        while not (isinstance(socket, ssl.SSLSocket) and socket.pending()):
            check_stop(self._rules.stop)
            left = end - time.monotonic()
            if left <= 0:
                raise httpcore2.ReadTimeout
            if ready.poll(1000 * min(left, STOP_POLL_SECONDS)):
                return
