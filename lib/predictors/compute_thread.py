"""The one thread in which all tensor work of a server runs.

coglet runs setup in the main thread and each prediction in whichever thread of its pool is free. OpenMP
keeps a set of workers for every thread that ever computed; from the second set on they stop spinning
between parallel regions, and denoising a small model takes a fifth longer. It also makes cancelling simple:
coglet's exception arrives in a thread that only waits.
"""

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
POLL_SECONDS = 0.05  # an exception injected into a waiting thread is raised when its wait returns


class ComputeThread:
    """Runs functions one after the other in a thread of its own.

    The caller waits on bare locks and queues: an exception that is injected between two steps of an Event
    or an executor can leave its inner lock held, and the next request would hang.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="compute", daemon=True).start()

    def run(self, function: Callable[[], Result], *, stop: threading.Event | None = None) -> Result:
        """The function's result, or its exception.

        Whatever interrupts the waiting (a cancelled request, Ctrl-C) sets `stop`, waits until the function
        has ended, and is raised again. What the function prints counts as printed here.
        """
        context, outcome = contextvars.copy_context(), []
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
            return result
        finally:
            del error  # with its traceback it would keep the failed work's tensors alive until a collection

    def _drain(self) -> None:
        """Wait until everything queued so far has ended, whether or not the last function got that far."""
        ended = threading.Lock()
        ended.acquire()
        self._work.put(ended.release)
        ended.acquire()

    def _serve(self) -> None:
        while True:
            self._work.get()()
