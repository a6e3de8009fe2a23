"""Fetch URL inputs by this service's rules, and tell uploaded files from paths on the server.

Cog turns an input of type Path that is a data URI or a URL into a temporary file. It follows any redirect to
any address, without a size limit, and leaves the file behind when reading fails; a plain path is passed on as
it is. Cog has no hook for this, so `install` replaces members of cog.types once, in setup. Without them
requests could reach private addresses, so a Cog in which they are missing or changed ends the start.
"""

import inspect
import io
import mimetypes
import os
import re
import shutil
import tempfile
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, cast

import cog.types

from lib.errors import UserError, shown
from lib.network import data_uri
from lib.network.http import Source, is_web_address, save, without_secrets
from lib.network.urls import request_rules
from lib.settings import current
from lib.storage.disk import disk_error, size_text

MAX_INPUT_BYTES = 2 * 2**30  # predictors also take videos and archives
GIVE = "give a data URI (data:image/png;base64,...) or an https:// address"
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
RAW_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64}[A-Za-z0-9+/_=\s-]*")
UNSAFE = re.compile(r"[^\w.+ ()\[\]-]")
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
        cog.types.URLPath.unlink = _unlink
        cog.types.Path.validate = classmethod(_validate)  # pyright: ignore[reportAttributeAccessIssue]
        _check_probe()
    except (AttributeError, TypeError, ValueError) as error:
        raise _incompatible(str(error)) from error


def check_file(path: Path | str) -> Path:
    """Return the path of an input file. Raises UserError for a path on the server unless it may be read."""
    text = str(path).removeprefix("file://")
    if text in _fetched or current().local_sources:
        _fetched.discard(text)
        return Path(text)
    raise UserError(f"{shown(text)} is a path on the server; {GIVE}.")


def _check_members() -> None:
    """Check that the members to replace exist and are of the kind that takes their place."""
    if not isinstance(vars(cog.types.URLFile).get("__wrapped__"), property):
        raise _incompatible("URLFile.__wrapped__ is not a property")
    if hasattr(cog.types.URLFile, "read"):  # it must come from what __wrapped__ returns
        raise _incompatible("URLFile.read does not use __wrapped__")
    convert = vars(cog.types.URLPath).get("convert")
    if not inspect.isfunction(convert) or list(inspect.signature(convert).parameters) != ["self"]:
        raise _incompatible("URLPath.convert is not a method without arguments")
    if not isinstance(vars(cog.types.Path).get("validate"), classmethod):
        raise _incompatible("Path.validate is not a class method")
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


def _validate(_: type[cog.types.Path], value: object) -> Path:
    """Return a file input as Cog's own does, or raise UserError for what is no file and no address."""
    if isinstance(value, Path):
        return value
    text = str(value).strip()
    found = SCHEME.match(text)
    scheme = found[1].lower() if found else ""  # RFC 3986: in either case
    text = scheme + text[len(scheme) :]
    if scheme == "data":
        media_type, content = data_uri.decode(text)
        name = f"file{mimetypes.guess_extension(media_type) or ''}"
        return cog.types.URLPath(source=text, filename=name, fileobj=io.BytesIO(content))
    if scheme in ("http", "https"):
        if not is_web_address(text):
            raise UserError(f"{shown(without_secrets(text))} is not an address; {GIVE}.")
        name = cog.types.get_filename(text)
        return cog.types.URLPath(source=text, filename=name, fileobj=cog.types.URLFile(text))
    if not text:
        raise UserError(f"the file is empty text; {GIVE}.")
    if "://" in text and scheme != "file":
        raise UserError(f"{shown(without_secrets(text))} cannot be fetched, only https:// addresses; {GIVE}.")
    if RAW_BASE64.fullmatch(text):
        raise UserError(f"{shown(text)} looks like base64 alone; {GIVE}.")
    return cog.types.Path(text)


def _convert(self: cog.types.URLPath) -> cog.types.Path:
    """Return the input as a temporary file of bounded size, fetched once. A failure leaves no file.

    It has the sender's name for it, which messages show, in a folder of its own.
    """
    if self._path is None:
        try:
            folder = Path(tempfile.mkdtemp(prefix="input-"))
        except OSError as error:
            raise disk_error(error, Path(tempfile.gettempdir())) from error
        file = folder / (UNSAFE.sub("_", self.filename).lstrip(".") or "file")
        try:
            if isinstance(self.fileobj, cog.types.URLFile):
                rules = request_rules()
                save(Source(url=self.source, max_bytes=MAX_INPUT_BYTES, rules=rules), file)
            else:
                _copy(cast("BinaryIO", self.fileobj), file)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._path = cog.types.Path(file)
        # Cog calls unlink after the request, but not where another input of the request fails: then nothing
        # but this object knows of the file.
        weakref.finalize(self._path, _discard, str(file), os.getpid())
        _fetched.add(str(file))
    return self._path


def _unlink(self: cog.types.URLPath, missing_ok: bool = False) -> None:
    """Remove the file and its folder, if there are any."""
    if self._path is not None:
        _discard(str(self._path), os.getpid())


def _discard(file: str, process: int) -> None:
    """Remove the file of an input whose request is over, in the process that fetched it, and its folder."""
    if os.getpid() == process:
        _fetched.discard(file)
        shutil.rmtree(Path(file).parent, ignore_errors=True)


def _copy(data: BinaryIO, path: Path) -> None:
    """Write the content of a data URI, which Cog has decoded."""
    body = data.read(MAX_INPUT_BYTES + 1)
    if len(body) > MAX_INPUT_BYTES:
        raise UserError(f"A data URI is larger than {size_text(MAX_INPUT_BYTES)}, the most an input may be.")
    try:
        path.write_bytes(body)
    except OSError as error:
        raise disk_error(error, path) from error
