"""What tests need of a running server beyond lib/serving/client.py."""

import time

from lib.serving.client import health


def wait_until_idle(url: str, *, seconds: float = 15.0) -> None:
    """Return when the server at `url` is ready for a request. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while (status := health(url).get("status")) != "READY":
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} is {status} after {seconds:g} s")
        time.sleep(0.05)
