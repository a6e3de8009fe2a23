"""Fetch URL inputs by this service's rules, and tell uploaded files from paths on the server.

Cog turns an input of type Path that is a data URI or a URL into a temporary file. It follows any redirect to
any address, without a size limit, and leaves the file behind when reading fails; a plain path is passed on as
it is. Cog has no hook for this, so `install` replaces two members of cog.types once, in setup. Without them
requests could reach private addresses, so a Cog in which they are missing or changed ends the start.
"""

import inspect
import io
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, cast

import cog.types

from lib.errors import UserError
from lib.network.http import Source, save
from lib.network.urls import request_rules
from lib.settings import current
from lib.storage.disk import disk_error, size_text

MAX_INPUT_BYTES = 2 * 2**30  # predictors also take videos and archives
PROBE_URL = "https://probe.invalid/name.bin"

_fetched: set[str] = set()
"""Temporary files made of URL inputs that no predictor has accepted yet."""


class IncompatibleCogError(RuntimeError):
    """This version of Cog fetches inputs in a way that cannot be replaced."""


def install() -> None:
    """Replace Cog's fetching of URL inputs. Safe to repeat. Raises IncompatibleCogError."""
    try:
        _check_members()
        cog.types.URLFile.__wrapped__ = property(_target)  # pyright: ignore[reportAttributeAccessIssue]
        cog.types.URLPath.convert = _convert
        _check_probe()
    except (AttributeError, TypeError, ValueError) as error:
        raise _incompatible(str(error)) from error


def check_file(path: Path | str) -> Path:
    """Return the path of an input file. Raises UserError for a path on the server unless it may be read."""
    text = str(path).removeprefix("file://")
    if text in _fetched or current().local_sources:
        _fetched.discard(text)
        return Path(text)
    raise UserError(f"{text!r} is a path on the server; upload the file or give an https:// address.")


def _check_members() -> None:
    """Check that the members to replace exist and are of the kind that takes their place."""
    if not isinstance(vars(cog.types.URLFile).get("__wrapped__"), property):
        raise _incompatible("URLFile.__wrapped__ is not a property")
    if hasattr(cog.types.URLFile, "read"):  # it must come from what __wrapped__ returns
        raise _incompatible("URLFile.read does not use __wrapped__")
    convert = vars(cog.types.URLPath).get("convert")
    if not inspect.isfunction(convert) or list(inspect.signature(convert).parameters) != ["self"]:
        raise _incompatible("URLPath.convert is not a method without arguments")
    if not inspect.isfunction(vars(cog.types.URLPath).get("unlink")):
        raise _incompatible("URLPath.unlink is not a method")


def _check_probe() -> None:
    """Check on an input that is never fetched that Cog's own code leads to the replacements."""
    path = cog.types.Path.validate(PROBE_URL)
    if not isinstance(path, cog.types.URLPath) or not isinstance(path.fileobj, cog.types.URLFile):
        raise _incompatible("Path.validate does not make a URLPath with a URLFile")
    url = object.__getattribute__(path.fileobj, "__url__")
    if (path.source, path.filename, path._path, url) != (PROBE_URL, "name.bin", None, PROBE_URL):
        raise _incompatible("URLPath.source, filename or _path, or URLFile.__url__ has another meaning")
    object.__setattr__(path.fileobj, "__target__", io.BytesIO(b"probe"))
    if path.fileobj.read() != b"probe":
        raise _incompatible("URLFile.read does not use __wrapped__")


def _incompatible(reason: str) -> IncompatibleCogError:
    return IncompatibleCogError(
        f"cog {version('cog')} is not supported: in cog.types, {reason}. Inputs could not be restricted to "
        "public addresses, so nothing is served. Install the version of cog in requirements-local.txt."
    )


def _target(self: cog.types.URLFile) -> object:
    """Return the stream that URLFile reads from: none, since `_convert` does not read it."""
    try:
        return object.__getattribute__(self, "__target__")
    except AttributeError:
        raise RuntimeError("inputs are fetched by URLPath.convert alone") from None


def _convert(self: cog.types.URLPath) -> cog.types.Path:
    """Return the input as a temporary file of bounded size, fetched once. A failure leaves no file."""
    if self._path is None:
        try:
            handle, name = tempfile.mkstemp(suffix=self.filename)
        except OSError as error:
            raise disk_error(error, Path(tempfile.gettempdir())) from error
        os.close(handle)
        try:
            if isinstance(self.fileobj, cog.types.URLFile):
                rules = request_rules()
                save(Source(url=self.source, max_bytes=MAX_INPUT_BYTES, rules=rules), Path(name))
            else:
                _copy(cast("BinaryIO", self.fileobj), Path(name))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._path = cog.types.Path(name)  # from which Cog removes the file after the request
        _fetched.add(name)
    return self._path


def _copy(data: BinaryIO, path: Path) -> None:
    """Write the content of a data URI, which Cog has decoded."""
    body = data.read(MAX_INPUT_BYTES + 1)
    if len(body) > MAX_INPUT_BYTES:
        raise UserError(f"A data URI is larger than {size_text(MAX_INPUT_BYTES)}, the most an input may be.")
    try:
        path.write_bytes(body)
    except OSError as error:
        raise disk_error(error, path) from error
