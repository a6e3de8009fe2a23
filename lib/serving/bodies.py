"""Read the JSON bodies of requests, within limits on size, memory and time."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from lib.serving.refusals import InvalidFieldError, RefusedError
from lib.storage.disk import size_text

MAX_BODY_BYTES = 100 << 20  # the most that coglet accepts
SECONDS = 900.0  # 100 MiB at 1 Mbit/s
CLOSE = {"Connection": "close"}
"""The rest of a refused body is not read, so nothing else can come over its connection."""


class Bodies:
    """Reads bodies of at most `max_bytes`, and holds at most `total_bytes` of all that arrive at once."""

    def __init__(self, *, max_bytes: int = MAX_BODY_BYTES, total_bytes: int = 4 * MAX_BODY_BYTES) -> None:
        self.max_bytes = max_bytes
        self.total_bytes = total_bytes
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """Yield the object in a body; until the block ends it counts as held. Raises RefusedError."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # A page of another site can send other types without asking first.
            raise RefusedError(415, "the body must be JSON: send `Content-Type: application/json`")
        body = bytearray()
        try:
            async with asyncio.timeout(SECONDS):
                async for block in request.stream():
                    self._held += len(block)
                    body += block
                    self._check(len(body))
            yield await run_in_threadpool(_parse, body)
        except TimeoutError:
            raise RefusedError(408, f"the body did not arrive within {SECONDS:g} s", headers=CLOSE) from None
        finally:
            self._held -= len(body)

    def _check(self, length: int) -> None:
        if length > self.max_bytes:
            limit = size_text(self.max_bytes)
            message = f"the body is larger than {limit}; give the https:// address of a large file instead"
            raise RefusedError(413, message, headers=CLOSE)
        if self._held > self.total_bytes:
            message = "the server is receiving too many large requests; send this one again later"
            raise RefusedError(429, message, headers={**CLOSE, "Retry-After": "10"})


def _parse(body: bytearray) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"Failed to parse the request body as JSON: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise InvalidFieldError(["body"], 'the body must be an object: {"input": {...}}')
    return document
