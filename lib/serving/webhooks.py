"""Deliver webhooks by the rules for URLs in requests: coglet itself would post to any address.

coglet is given the address of a relay in this process, one for each prediction, which nobody else can guess.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import httpx2
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import Response

from lib.errors import UserError
from lib.network.transport import Rules, Transport

SECONDS = 30.0
"""The longest that one event may take: a receiver that never answers occupies a thread."""
THREADS = 8
KEPT = 64
"""Predictions whose events are still accepted; coglet repeats the last event for a while after the end."""
REFUSED, FAILED = 410, 502
"""Replies to coglet: it does not repeat an event after the first, and does so after the second."""


@dataclass(frozen=True, kw_only=True)
class Hook:
    """Where the events of one prediction go, and what is removed from them: the path in coglet's id."""

    url: str
    remove: bytes


class Webhooks:
    """The relay. `rules` returns the rules for one delivery, `report` prints a line about one that failed."""

    def __init__(self, rules: Callable[[], Rules], report: Callable[[str], None]) -> None:
        self._rules = rules
        self._report = report
        self._hooks: OrderedDict[str, Hook] = OrderedDict()
        self._threads = CapacityLimiter(THREADS)

    async def add(self, hook: Hook) -> str:
        """Return the key under which `receive` accepts the events of a prediction. Raises UserError."""
        await to_thread.run_sync(self._rules().check_url, hook.url, limiter=self._threads)
        key = secrets.token_urlsafe(32)
        self._hooks[key] = hook
        while len(self._hooks) > KEPT:
            self._hooks.popitem(last=False)
        return key

    async def receive(self, request: Request) -> Response:
        """Pass one event of coglet on and answer as its receiver did. The path ends with the key."""
        hook = self._hooks.get(request.path_params["key"])
        if hook is None:
            return Response(status_code=404)
        body = (await request.body()).replace(hook.remove, b"")
        authorization = request.headers.get("authorization")  # coglet's own, of WEBHOOK_AUTH_TOKEN
        headers = {"Content-Type": "application/json", "User-Agent": "cogvideox-service"}
        headers |= {"Authorization": authorization} if authorization else {}
        status = await to_thread.run_sync(self._post, hook.url, body, headers, limiter=self._threads)
        return Response(status_code=status)

    def _post(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        rules = self._rules()
        try:
            rules.check_url(url)
            transport = Transport(rules)
            with httpx2.Client(transport=transport, timeout=SECONDS, trust_env=False) as client:
                reply = client.post(url, content=body, headers=headers, follow_redirects=False)
        except UserError as error:
            self._report(f"webhook refused: {error}")
            return REFUSED
        except Exception as error:  # whatever the receiver's host does
            self._report(f"webhook not delivered: {type(error).__name__}: {str(error)[:200]}")
            return FAILED
        if reply.is_redirect:
            self._report("webhook refused: its receiver redirects; give the final address")
            return REFUSED
        return reply.status_code
