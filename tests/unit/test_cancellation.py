"""A request's stop ends work when it is set, and when the time outside of the model's work is over."""

import threading
import time

import pytest

from lib.cancellation import RequestStop, Stopped, TimeLimitError, check_stop, untimed


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_set_stop_ends_the_work():
    stop = threading.Event()
    check_stop(stop)
    check_stop(None)
    stop.set()
    with pytest.raises(Stopped):
        check_stop(stop)


def test_a_request_may_take_its_time_and_no_more(clock):
    stop = RequestStop(60)
    clock[0] += 59
    check_stop(stop)
    clock[0] += 2
    with pytest.raises(TimeLimitError, match=r"longer than 60 s before .*COGVIDEOX_PREPARE_SECONDS"):
        check_stop(stop)


def test_the_models_work_does_not_count(clock):
    stop = RequestStop(60)
    clock[0] += 40
    with untimed(stop):
        clock[0] += 3600
        check_stop(stop)
    clock[0] += 19
    check_stop(stop)
    clock[0] += 2
    with pytest.raises(TimeLimitError):
        check_stop(stop)


def test_a_block_within_another_does_not_start_the_clock(clock):
    stop = RequestStop(60)
    with untimed(stop):
        with untimed(stop):
            clock[0] += 3600
        clock[0] += 3600
        check_stop(stop)
    clock[0] += 59
    check_stop(stop)


def test_a_cancel_during_the_models_work_is_seen(clock):
    stop = RequestStop(60)
    with pytest.raises(Stopped), untimed(stop):
        stop.set()
        check_stop(stop)


def test_a_plain_event_has_no_limit():
    with untimed(threading.Event()), untimed(None):
        pass
