"""Makes Cog fetch URL inputs by this service's rules, and tells files that a request brought from others.

Cog turns an input of type Path that is a data URI or a URL into a temporary file, following any redirect
to any address, without a limit, and leaves the file behind when reading fails; a plain path it passes on as
it stands. It has no hook for this, so two members of its (pinned) types are replaced, once, at setup.
"""

import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import cog.types

from lib.errors import UserError
from lib.network.http import TRANSIENT, Source, TruncatedError, shown
from lib.network.urls import local_sources_allowed, open_url
from lib.storage.archive import disk_error, size_text

MAX_INPUT_BYTES = 2 * 2**30  # predictors also take videos and archives
COPY_BYTES = 1 << 20

_brought: set[str] = set()


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
    response = open_url(object.__getattribute__(self, "__url__"))
    object.__setattr__(self, "__target__", response)
    return response


def _convert(self: cog.types.URLPath) -> cog.types.Path:
    """As Cog's: the input as a temporary file, made once. Bounded, and nothing is left of one that fails."""
    if self._path is None:
        try:
            handle, name = tempfile.mkstemp(suffix=self.filename)
        except OSError as error:
            raise disk_error(error, Path(tempfile.gettempdir())) from error
        try:
            with open(handle, "wb") as file:
                _copy(self.fileobj, file, source=self.source)
        except BaseException:
            os.unlink(name)
            raise
        self._path = cog.types.Path(name)  # by this, Cog removes the file after the request
        _brought.add(name)
    return self._path


def _copy(reader: BinaryIO, file: BinaryIO, *, source: str) -> None:
    left = MAX_INPUT_BYTES
    try:
        while block := _read(reader, source):
            left -= len(block)
            if left < 0:
                most = size_text(MAX_INPUT_BYTES)
                raise UserError(f"{shown(source)[:200]!r} is larger than {most}, the most an input may be.")
            file.write(block)
        file.flush()
    except OSError as error:
        raise disk_error(error, Path(tempfile.gettempdir())) from error


def _read(reader: BinaryIO, source: str) -> bytes:
    try:
        block = reader.read(COPY_BYTES)
        # http.client ends a body that was cut off as if it were whole.
        if not block and (lost := getattr(reader, "length", None)):
            raise TruncatedError(f"the connection ended {lost:,} bytes early")
        return block
    except TRANSIENT as error:
        raise Source(url=source).failure(error) from error
