"""Stop work early when another thread asks for it: on a cancel, Ctrl-C or a signal.

What happens on cancel:
1. The client closes the connection or posts /predictions/ID/cancel. coglet raises its CancelationException in
   the thread that runs the predictor. (In commands/ a signal handler sets the event of step 3 directly.)
2. That thread only waits in ComputeThread.run (lib/predictors/compute_thread.py), which
3. sets the request's `stop` event and waits until the compute thread has finished with the request.
4. The compute thread calls check_stop between steps (of denoising, decoding, captioning, downloading), which
   raises Stopped. Context managers remove what was written and detach LoRAs on the way up.
5. ComputeThread.run raises coglet's exception again, and the server reports the request as cancelled.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """Work ended early because its `stop` event was set."""


class TimeLimitError(Exception):
    """A request took longer than it may. No UserError: that of one clip does not end a request."""


class RequestStop(threading.Event):
    """The `stop` of a request, with a limit on its time outside of untimed()."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._limit = self._left = seconds
        self._since = time.monotonic()
        self._pauses = 0
        """How many untimed blocks are open, one in another."""

    def check_time(self) -> None:
        """Raise TimeLimitError once the time is over."""
        if not self._pauses and time.monotonic() - self._since > self._left:
            raise TimeLimitError(
                f"the request took longer than {self._limit:g} s before and after the model's work, such as "
                "downloading and unpacking (COGVIDEOX_PREPARE_SECONDS)"
            )

    def pause(self) -> None:
        if not self._pauses:
            self._left -= time.monotonic() - self._since
        self._pauses += 1

    def resume(self) -> None:
        self._pauses -= 1
        if not self._pauses:
            self._since = time.monotonic()


@contextmanager
def untimed(stop: threading.Event | None) -> Iterator[None]:
    """Leave the time in this block, the model's work, out of a request's limit."""
    if not isinstance(stop, RequestStop):
        yield
        return
    stop.pause()
    try:
        yield
    finally:
        stop.resume()


def check_stop(stop: threading.Event | None) -> None:
    """Raise Stopped once `stop` is set, and TimeLimitError once a RequestStop's time is over."""
    if stop is None:
        return
    if stop.is_set():
        raise Stopped
    if isinstance(stop, RequestStop):
        stop.check_time()
