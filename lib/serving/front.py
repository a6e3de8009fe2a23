"""The HTTP application that callers reach: it checks each request and passes it on to coglet.

coglet trusts its callers: it uses the id of a prediction as a path, posts webhooks to any address, ends at
POST /shutdown, and answers pages of any site. So it listens on an address that only this server uses, and
gets requests whose id, body and webhook are checked.

coglet joins the id to /tmp/coglet/predictions and makes that folder. It belongs to the first user of the
machine, which shuts others out, and nothing in it is ever removed. Joining an absolute path gives that path:
the id that coglet gets is therefore a path in the scratch directory of its server.
"""

import asyncio
import json
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from lib.errors import UserError
from lib.serving.bodies import Bodies
from lib.serving.refusals import InvalidFieldError, RefusedError, answer, shortened
from lib.serving.webhooks import Hook, Webhooks

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
PASSED_HEADERS = ("accept", "prefer", "traceparent", "tracestate")
POLL_SECONDS = 0.05
CRASHES = (b'{"error":"Worker crashed"', b'{"error":"Failed to send request')
"""How the replies begin to a request during which the worker process ended, and to one just after that."""
CRASH_MESSAGE = (
    "the server's worker process ended during this request, for lack of memory or by a crash; it is started "
    "again, so the next request works"
)
DYING_SECONDS = 0.5
"""A request that came while the worker process was ending fails so soon, and is repeated."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A coglet that is ready: its address, the folder for its predictions, and how to report its failure."""

    url: str
    folder: Path
    lost: Callable[[], None]


class EndedError(RuntimeError):
    """coglet has ended and is not started again; the message holds the reason."""


class Front:
    """Passes requests on to coglet; `app` is the ASGI application.

    Args:
        kind: "predictions" or "trainings": what this server offers.
        url: the address under which coglet reaches this application, for webhooks.
        target: returns the running coglet, None while it starts. Raises EndedError.
        webhooks: the relay for events.
        access: `lib.serving.access.Access` with the options of this server.
    """

    def __init__(
        self,
        *,
        kind: str,
        url: str,
        target: Callable[[], Target | None],
        webhooks: Webhooks,
        access: Middleware,
    ) -> None:
        self._kind = kind
        self._url = url
        self._target = target
        self._webhooks = webhooks
        self._bodies = Bodies()
        self._left: set[Path] = set()
        """Folders of predictions whose end is not known here: asynchronous, or their caller has gone."""
        routes = [
            Route("/", self._index),
            Route("/health-check", self._health),
            Route("/openapi.json", self._schema),
            Route("/shutdown", self._shutdown, methods=["POST"]),
            Route(f"/{kind}", self._create, methods=["POST"]),
            Route(f"/{kind}/{{id:path}}/cancel", self._cancel, methods=["POST"]),
            Route(f"/{kind}/{{id:path}}", self._create, methods=["PUT"]),
        ]
        self._paths = [f"/{kind}", f"/{kind}/ID", f"/{kind}/ID/cancel", "/health-check", "/openapi.json"]
        handlers = {RefusedError: answer, HTTPException: self._answer_http}
        guarded = Starlette(routes=routes, middleware=[access], exception_handlers=handlers)
        relay = Route("/webhooks/{key}", webhooks.receive, methods=["POST"])
        self.app = Starlette(routes=[relay, Mount("/", app=guarded)], lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        # Each request has a connection of its own: closing it cancels the prediction.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx2.AsyncClient(timeout=None, trust_env=False, limits=limits) as self._client:
            yield

    async def _index(self, _: Request) -> Response:
        kind = self._kind
        return JSONResponse(
            {
                f"{kind}_url": f"/{kind}",
                f"{kind}_idempotent_url": f"/{kind}/{{id}}",
                f"{kind}_cancel_url": f"/{kind}/{{id}}/cancel",
                "healthcheck_url": "/health-check",
                "openapi_url": "/openapi.json",
            }
        )

    async def _answer_http(self, request: Request, error: Exception) -> Response:
        """Answer a request for a path that does not exist, or with a method that it does not have."""
        assert isinstance(error, HTTPException), "registered for it alone"
        path = request.url.path[:200]
        messages = {
            404: f"{path!r} does not exist; this server has {', '.join(self._paths)}",
            405: f"{path!r} has no {request.method[:20]}",
        }
        message = messages.get(error.status_code, error.detail)
        return RefusedError(error.status_code, message, headers=error.headers).reply

    async def _health(self, _: Request) -> Response:
        try:
            target = self._target()
        except EndedError as error:
            return JSONResponse({"status": "DEFUNCT", "setup": {"status": "failed", "logs": str(error)}})
        return await self._send(target, "GET", "/health-check") if target else _starting()

    async def _schema(self, _: Request) -> Response:
        return await self._send(await self._ready(), "GET", "/openapi.json")

    async def _shutdown(self, _: Request) -> Response:
        raise RefusedError(403, "this server is stopped where it was started, not by a request")

    async def _cancel(self, request: Request) -> Response:
        identifier = _checked_id(request.path_params["id"], ["path", "id"])
        target = await self._ready()
        return await self._send(target, "POST", self._path(target, identifier) + "/cancel")

    async def _create(self, request: Request) -> Response:
        """Make a prediction or a training, or return the state of the running one with this id."""
        named = request.path_params.get("id")
        if named is not None:
            _checked_id(named, ["path", "id"])
        async with self._bodies.read(request) as body:
            identifier = _checked_id(body.get("id") or named or secrets.token_hex(13), ["body", "id"])
            if named not in (None, identifier):
                raise InvalidFieldError(["body", "id"], f"it must be the id in the address, {named}")
            began = time.monotonic()
            reply = await self._predict(request, identifier, body)
            if _has_crashed(reply) and time.monotonic() - began < DYING_SECONDS and "webhook" not in body:
                reply = await self._predict(request, identifier, body)
            return reply

    async def _predict(self, request: Request, identifier: str, body: dict[str, Any]) -> Response:
        """Send a prediction to coglet, and remove the folders of those that have ended by its reply."""
        target = await self._ready()
        folder = target.folder / identifier
        sent = body | {"id": str(folder)}
        if body.get("webhook") is not None:
            sent["webhook"] = await self._relay(body["webhook"], target)
        content = (await run_in_threadpool(json.dumps, sent)).encode()
        headers = {name: request.headers[name] for name in PASSED_HEADERS if name in request.headers}
        headers["Content-Type"] = "application/json"
        ended = self._left - {folder}
        work = self._send(target, "PUT", self._path(target, identifier), content=content, headers=headers)
        try:
            reply = await _while_connected(request, work)
        except BaseException:
            self._left.add(folder)
            raise
        if reply.status_code == 202:
            self._left.add(folder)
        elif reply.status_code == 200:
            ended.add(folder)
        if reply.status_code in (200, 202):  # accepted: one runs at a time, so those before it are over
            self._left -= ended
            await run_in_threadpool(_remove, ended)
        return reply

    async def _send(
        self,
        target: Target,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        """Return coglet's reply with the ids that callers know."""
        try:
            reply = await self._client.request(method, target.url + path, content=content, headers=headers)
        except httpx2.HTTPError:
            raise RefusedError(503, CRASH_MESSAGE) from None
        body = reply.content.replace(f"{target.folder}/".encode(), b"")
        if body.startswith(CRASHES):
            target.lost()
            body = json.dumps(json.loads(body) | {"error": CRASH_MESSAGE}).encode()
        if reply.status_code == 422:
            body = await run_in_threadpool(shortened, body)
        kept = {"Content-Type": reply.headers.get("Content-Type", "text/plain")}
        return Response(body, status_code=reply.status_code, headers=kept)

    async def _relay(self, webhook: object, target: Target) -> str:
        """Return the address to which coglet posts the events for `webhook`."""
        try:
            if not isinstance(webhook, str):
                raise UserError("it must be an address")
            key = await self._webhooks.add(Hook(url=webhook, remove=f"{target.folder}/".encode()))
        except UserError as error:
            raise InvalidFieldError(["body", "webhook"], str(error)) from None
        return f"{self._url}/webhooks/{key}"

    async def _ready(self) -> Target:
        """Return the running coglet, after waiting for one that starts."""
        try:
            while (target := self._target()) is None:
                await asyncio.sleep(POLL_SECONDS)
        except EndedError as error:
            raise RefusedError(503, str(error)) from None
        return target

    def _path(self, target: Target, identifier: str) -> str:
        return f"/{self._kind}/{quote(str(target.folder / identifier), safe='')}"


def _starting() -> Response:
    return JSONResponse({"status": "STARTING"})


def _has_crashed(reply: Response) -> bool:
    return CRASH_MESSAGE.encode() in bytes(reply.body)[:1000]


def _checked_id(identifier: object, location: list[str]) -> str:
    """Return an id that is safe as the name of a folder. Raises InvalidFieldError."""
    if isinstance(identifier, str) and ID.fullmatch(identifier):
        return identifier
    message = f"{str(identifier)[:100]!r} is not an id: use 1 to 64 letters, digits, - and _"
    raise InvalidFieldError(location, message)


def _remove(folders: set[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the result of `work`, which is cancelled as soon as the caller is gone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
