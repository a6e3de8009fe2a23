"""Errors that the caller can fix."""


class UserError(ValueError):
    """A request that cannot be served as given.

    The message says what was given, what is allowed, and the nearest valid value; it is shown to the
    person who made the request, so it names inputs, not internals.
    """
