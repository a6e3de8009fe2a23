"""Errors that the caller can fix."""

SHOWN_CHARACTERS = 200
"""The most of an input that a message repeats."""


class UserError(ValueError):
    """A request that cannot be served as given.

    The message says what was given, what is allowed, and the nearest valid value; it is shown to the
    person who made the request, so it names inputs, not internals.
    """


def cut(text: object) -> str:
    """Return an input for a message, cut to SHOWN_CHARACTERS."""
    text = str(text)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def shown(value: object) -> str:
    """Return the repr of an input for a message, cut to SHOWN_CHARACTERS."""
    return repr(cut(value)) if isinstance(value, str) else cut(repr(value))
