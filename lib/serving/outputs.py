"""Write a prediction's output to disk or to the terminal."""

import base64
import binascii
import json
import mimetypes
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from lib.errors import UserError

DOWNLOAD_SECONDS = 60.0
"""The longest silence."""
# mimetypes has other or no endings for these on some systems.
ENDINGS = {"application/x-tar": ".tar", "image/jpeg": ".jpg", "video/webm": ".webm", "text/plain": ".txt"}


def save_output(output: Any, *, target: Path | None = None, folder: Path | None = None) -> list[Path]:
    """Write every file in `output` (data URIs and URLs) and return the paths; print other values as text.

    A single file goes to `target` if given. Otherwise names are `output.mp4`, `output.1.mp4`, ... in
    `folder` (the working directory by default), and nothing is overwritten. A file appears under its name
    when it is complete. Pipes and devices, such as /dev/stdout, are not among the returned paths. Raises
    UserError when a file cannot be downloaded or written.
    """
    if isinstance(output, list):
        return [
            path for item in output for path in save_output(item, folder=folder or (target and target.parent))
        ]
    if isinstance(output, dict):
        files = {key: value for key, value in output.items() if _is_file(value)}
        rest = {key: value for key, value in output.items() if key not in files}
        if rest:
            print(json.dumps(rest, indent=2, ensure_ascii=False))
        single = target if len(files) == 1 else None
        return [path for value in files.values() for path in save_output(value, target=single, folder=folder)]
    if _is_file(output):
        content, ending = _read(output)
        return _replace(target, content) if target else [_create(folder or Path(), ending, content)]
    text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
    if target:
        return _replace(target, f"{text}\n".encode())
    print(text)
    return []


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("data:", "http://", "https://"))


def _read(source: str) -> tuple[bytes, str]:
    """Return the content and the file ending of a data URI or a URL."""
    if not source.startswith("data:"):
        try:
            reply = httpx2.get(source, follow_redirects=True, timeout=DOWNLOAD_SECONDS).raise_for_status()
        except httpx2.HTTPError as error:
            raise UserError(f"cannot download the output: {error}") from error
        return reply.content, Path(source.partition("?")[0]).suffix
    header, _, payload = source.partition(",")
    kind = header.removeprefix("data:").partition(";")[0]
    try:
        content = base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the server's output is not valid base64 ({error})") from error
    return content, ENDINGS.get(kind) or mimetypes.guess_extension(kind) or ".bin"


def _create(folder: Path, ending: str, content: bytes) -> Path:
    """Write a new file under the first free name, even when several processes look for one at once."""
    with _written(folder / f"output{ending}", content) as partial:
        number = 0
        while True:
            path = folder / (f"output{ending}" if number == 0 else f"output.{number}{ending}")
            try:
                path.touch(exist_ok=False)  # reserves the name; not every file system has hard links
            except FileExistsError:
                number += 1
                continue
            try:
                os.replace(partial, path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return path


def _replace(path: Path, content: bytes) -> list[Path]:
    if path.exists() and not path.is_file():  # do not replace a device with a file
        try:
            path.write_bytes(content)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return []
    place = path.resolve()  # nor a link, such as /dev/stdout when it leads to a file
    with _written(place, content) as partial:
        os.replace(partial, place)
    return [path]


@contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """Yield a file with `content` next to `path` under a temporary name, removed after the block."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(content)
        yield partial
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
