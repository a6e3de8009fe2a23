"""Error replies in the form of Cog's own, which clients already read."""

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse


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


async def answer(_: Request, error: Exception) -> JSONResponse:
    """Answer a request that raised RefusedError."""
    assert isinstance(error, RefusedError), "registered for it alone"
    return error.reply
