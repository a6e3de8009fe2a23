"""Bodies of requests are read within limits on size and memory."""

import asyncio
import json

import pytest
from starlette.requests import Request

from lib.serving.bodies import Bodies
from lib.serving.refusals import RefusedError


def request(*blocks: bytes, content_type: str = "application/json") -> Request:
    waiting = [{"type": "http.request", "body": block, "more_body": True} for block in blocks]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict:
        return waiting.pop(0)

    return Request({"type": "http", "headers": [(b"content-type", content_type.encode())]}, receive)


async def read(bodies: Bodies, incoming: Request) -> dict:
    async with bodies.read(incoming) as document:
        return document


def refusal(incoming: Request, **limits: int) -> tuple[int, str]:
    with pytest.raises(RefusedError) as refused:
        asyncio.run(read(Bodies(**limits), incoming))
    return refused.value.reply.status_code, json.loads(bytes(refused.value.reply.body))["detail"]


def test_a_body_is_the_object_in_it():
    assert asyncio.run(read(Bodies(), request(b'{"input": {"a"', b": 1}}"))) == {"input": {"a": 1}}


@pytest.mark.parametrize(
    "kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_what_a_page_can_send_unasked_is_415(kind):
    status, message = refusal(request(b"{}", content_type=kind))
    assert (status, message) == (415, "the body must be JSON: send `Content-Type: application/json`")


def test_the_content_type_may_name_a_character_set():
    incoming = request(b"{}", content_type="Application/JSON; charset=utf-8")
    assert asyncio.run(read(Bodies(), incoming)) == {}


@pytest.mark.parametrize("body", [b"{bad", b"", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_malformed_json_is_400(body):
    status, message = refusal(request(body))
    assert status == 400
    assert message.startswith("Failed to parse the request body as JSON: ") and len(message) < 300


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"text"'])
def test_json_that_is_no_object_is_422(body):
    status, details = refusal(request(body))
    assert (status, details[0]["loc"]) == (422, ["body"])


def test_a_body_over_the_limit_is_413_and_not_read_to_its_end():
    incoming = request(b"x" * 60, b"x" * 60, b"x" * 60)
    status, message = refusal(incoming, max_bytes=100, total_bytes=1000)
    assert status == 413 and "give the https:// address of a large file instead" in message
    assert asyncio.run(incoming.receive())["body"] == b"x" * 60


def test_bodies_that_arrive_at_once_are_held_up_to_a_limit_and_freed_after():
    bodies = Bodies(max_bytes=100, total_bytes=150)
    document = json.dumps({"text": "x" * 80}).encode()

    async def check() -> None:
        async with bodies.read(request(document)):
            with pytest.raises(RefusedError) as refused:
                await read(bodies, request(document))
            assert refused.value.reply.status_code == 429
            assert refused.value.reply.headers["retry-after"] == "10"
        assert await read(bodies, request(document)) == {"text": "x" * 80}

    asyncio.run(check())
