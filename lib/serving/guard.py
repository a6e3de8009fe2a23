"""Makes Cog fetch URL inputs by this service's rules, and tells files that a request brought from others.

Cog turns an input of type Path that is a data URI or a URL into a temporary file, following any redirect
to any address, without a limit; a plain path it passes on as it stands. It has no hook for this, so two
methods of its (pinned) types are replaced, once, at setup.
"""

import os
from pathlib import Path

import cog.types

from lib.errors import UserError
from lib.sources import local_sources_allowed, open_url

MAX_INPUT_BYTES = 2 * 2**30
COPY_BYTES = 1 << 20

_brought: set[str] = set()
_original_convert = cog.types.URLPath.convert


def install() -> None:
    """Replace Cog's fetching of inputs. Safe to repeat."""
    cog.types.URLFile.__wrapped__ = property(_open)
    cog.types.URLPath.convert = _convert


def check_file(path: Path | str) -> Path:
    """The path of an input file, if the request brought it or local files are allowed; else UserError."""
    text = str(path).removeprefix("file://")
    if text in _brought or local_sources_allowed():
        _brought.discard(text)
        return Path(text)
    raise UserError(f"{text!r} is a path on the server; upload the file or give an https:// address.")


def _open(self: cog.types.URLFile) -> object:
    """What URLFile reads from; opened once, at the first use."""
    try:
        return object.__getattribute__(self, "__target__")
    except AttributeError:
        pass
    raw = open_url(object.__getattribute__(self, "__url__")).raw
    raw.decode_content = True
    object.__setattr__(self, "__target__", raw)
    return raw


def _convert(self: cog.types.URLPath) -> cog.types.Path:
    """As Cog's, but bounded, and remembering the file as one that the request brought."""
    if self._path is None:
        self.fileobj = _Bounded(self.fileobj, self.source)
    path = _original_convert(self)
    _brought.add(os.fspath(path))
    return path


class _Bounded:
    """A readable file that refuses to give more than MAX_INPUT_BYTES."""

    def __init__(self, file: object, source: str) -> None:
        self.file, self.source, self.left = file, source, MAX_INPUT_BYTES

    def read(self, size: int = COPY_BYTES) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            shown = self.source[:200]
            raise UserError(
                f"{shown!r} is larger than {MAX_INPUT_BYTES // 2**30} GiB, the most an input may be."
            )
        return data
