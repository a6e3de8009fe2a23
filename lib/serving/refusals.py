"""Error replies in the form of Cog's own, which clients already read."""

import json
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse

from lib.errors import SHOWN_CHARACTERS


class RefusedError(Exception):
    """A request that is answered with an error; `reply` is the answer."""

    def __init__(self, status: int, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reply = JSONResponse({"detail": message}, status_code=status, headers=headers)


class InvalidFieldError(RefusedError):
    """A 422 that names the part of the request that is wrong, such as `["body", "webhook"]`."""

    def __init__(self, location: list[str], message: str) -> None:
        super().__init__(422, message)
        detail = [{"loc": location, "msg": message, "type": "value_error"}]
        self.reply = JSONResponse({"detail": detail}, status_code=422)


def shortened(reply: bytes) -> bytes:
    """Return coglet's 422 without the middle of long messages, which begin with the complete input."""
    try:
        document = json.loads(reply)
        for each in document["detail"]:
            each["msg"] = _ends_of(each["msg"])
    except (ValueError, KeyError, TypeError):
        return reply[: 20 * SHOWN_CHARACTERS]
    return json.dumps(document).encode()


def _ends_of(text: str) -> str:
    if len(text) <= 2 * SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} ... {text[-SHOWN_CHARACTERS:]}"


async def answer(_: Request, error: Exception) -> JSONResponse:
    """Answer a request that raised RefusedError."""
    assert isinstance(error, RefusedError), "registered for it alone"
    return error.reply
