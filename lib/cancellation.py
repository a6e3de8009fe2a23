"""Stopping work early: an event that any thread may set, and the exception that unwinds the work."""

import threading


class Stopped(Exception):
    """Raised by work that found its `stop` event set."""


def check_stop(stop: threading.Event | None) -> None:
    """Raise Stopped once `stop` is set."""
    if stop is not None and stop.is_set():
        raise Stopped
