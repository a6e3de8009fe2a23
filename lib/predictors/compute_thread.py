"""The thread in which all tensor work of a server runs.

coglet runs setup in the main thread and each prediction in whichever thread of its pool is free, and cancels
by raising an exception in that thread. Here it only waits, so the work itself is stopped at a defined point
(see lib/cancellation.py). OpenMP also keeps a set of workers for every thread that has computed: with a
second set, denoising a small model on a CPU takes a fifth longer.
"""

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import TypeVar, cast

Result = TypeVar("Result")
POLL_SECONDS = 0.05  # an exception raised from another thread arrives when the wait returns


class ComputeThread:
    """Run functions one after the other in one thread.

    The caller waits on plain locks and queues: an exception raised from outside between two steps of an
    Event or an executor can leave its inner lock held, and the next request would hang.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="compute", daemon=True).start()

    def run(self, function: Callable[[], Result], *, stop: threading.Event | None = None) -> Result:
        """Return the function's result, or raise its exception.

        Whatever interrupts the caller (a cancelled request, Ctrl-C) sets `stop`, waits until the function has
        ended, and is raised again. What the function prints belongs to the caller's request.
        """
        context = contextvars.copy_context()
        outcome: list[tuple[Result | None, BaseException | None]] = []
        running = threading.Lock()
        running.acquire()

        def work() -> None:
            try:
                outcome.append((context.run(function), None))
            except BaseException as error:  # raised again in the caller's thread
                outcome.append((None, error))
            finally:
                running.release()

        try:
            self._work.put(work)
            while not running.acquire(timeout=POLL_SECONDS):
                pass
        except BaseException:
            if stop is not None:
                stop.set()
            self._drain()
            outcome.clear()
            raise
        result, error = outcome.pop()
        try:
            if error is not None:
                raise error
            return cast("Result", result)
        finally:
            del error  # its traceback would keep the failed work's tensors alive until a collection

    def _drain(self) -> None:
        """Wait until everything queued so far has ended, whether or not the last function got that far."""
        ended = threading.Lock()
        ended.acquire()
        self._work.put(ended.release)
        ended.acquire()

    def _serve(self) -> None:
        while True:
            self._work.get()()
