"""The one thread in which all tensor work of a server runs.

coglet runs setup in the main thread and each prediction in whichever thread of its pool is free. OpenMP
keeps a set of workers for every thread that ever computed; from the second set on they stop spinning
between parallel regions, and denoising a small model takes a fifth longer. It also makes cancelling simple:
coglet's exception arrives in a thread that only waits.
"""

import contextvars
import ctypes
import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
SPIN_COUNT = "100000"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT_BYTES, MAPPED_BYTES = 512 * 2**20, 2**20
POLL_SECONDS = 0.05  # an exception injected into a waiting thread is raised when its wait returns


def limit_spinning() -> None:
    """Let OpenMP's threads sleep soon while they wait for one another; to be called before torch is imported.

    By default they spin on. Alone that gains nothing measurable; beside other work on the same cores the
    one that spins keeps the one it waits for from running, and a clip takes twenty times as long.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def keep_memory() -> None:
    """Let glibc keep up to KEPT_BYTES of freed memory, for all threads together, instead of returning it.

    By default every tensor of more than some hundred kilobytes is a mapping of its own, and a VAE on a CPU
    spends a third of its time on the kernel clearing pages. Elsewhere than on glibc nothing happens.
    """
    _tell_malloc({M_ARENA_MAX: 1, M_MMAP_THRESHOLD: KEPT_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES})


def return_memory() -> None:
    """The opposite, for models so large that what is kept between tensors would be missing elsewhere.

    Left alone, glibc comes to keep tensors of up to 32 MiB in its heap, where they leave gaps: a third of
    what a VAE needs for a small clip.
    """
    _tell_malloc({M_MMAP_THRESHOLD: MAPPED_BYTES, M_TRIM_THRESHOLD: MAPPED_BYTES})


def _tell_malloc(settings: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in settings.items():
            mallopt(name, value)


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
