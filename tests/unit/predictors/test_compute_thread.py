import contextvars
import ctypes
import gc
import threading
import time
import weakref

import pytest

from lib.cancellation import Stopped
from lib.predictors.compute_thread import ComputeThread


class Cancelled(BaseException):
    """What coglet injects into the thread of a cancelled request."""


def test_all_work_runs_in_one_thread_that_is_not_the_callers():
    compute, seen = ComputeThread(), []
    callers = [
        threading.Thread(target=lambda: seen.append(compute.run(threading.get_ident))) for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(set(seen)) == 1
    assert seen[0] not in {threading.get_ident(), *(caller.ident for caller in callers)}


def test_results_exceptions_and_context_pass_through():
    compute, variable = ComputeThread(), contextvars.ContextVar("request")
    variable.set("mine")
    assert compute.run(variable.get) == "mine"
    for error in (ValueError("boom"), TimeoutError("inside")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error), match=str(error)):
            compute.run(fail)


def test_a_failed_function_leaves_nothing_alive():
    compute, held = ComputeThread(), []

    class Large:
        pass

    def fail() -> None:
        large = Large()
        held.append(weakref.ref(large))
        raise ValueError("boom")

    gc.disable()
    try:
        with pytest.raises(ValueError):
            compute.run(fail)
        assert held[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("delay", [0.0, 0.0, 0.0, 0.01, 0.06])
def test_an_injected_cancellation_stops_the_work_and_is_raised_in_the_caller(delay):
    compute, outcome, finished = ComputeThread(), [], []
    stop, started = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        while not stop.wait(0.01):
            pass
        finished.append(True)
        raise Stopped

    def caller() -> None:
        try:
            compute.run(work, stop=stop)
        except BaseException as error:
            outcome.append((type(error), bool(finished)))

    thread = threading.Thread(target=caller)
    thread.start()
    started.wait()
    time.sleep(delay)
    cancelled = time.monotonic()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Cancelled))
    thread.join(timeout=5)
    assert outcome == [(Cancelled, True)]
    assert time.monotonic() - cancelled < 1
    assert compute.run(lambda: "next") == "next"
