"""Fetching one URL to a file: resumed where it stopped, checked, bounded, and there only when whole."""

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

from lib.cancellation import check_stop
from lib.network import partial_file
from lib.network.http import (
    STOP_POLL_SECONDS,
    TRANSIENT,
    FetchError,
    Patience,
    Rules,
    Source,
    TruncatedError,
    shown,
    until,
)
from lib.network.partial_file import Part, Progress, Remote
from lib.storage.disk import NoSpaceError, disk_error, require_free_space, size_text

BLOCK_BYTES = 256 << 10
# pget waits for ever on a body that stalls: below this pace it is stopped and Python takes over.
PGET_SLOWEST_BYTES_PER_SECOND = 256 << 10


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    max_bytes: int | None = None,
    headers: Mapping[str, str] | None = None,
    report: Callable[[str], None] = print,
    timeout: float = 30.0,
    connections: int = 8,
    stop: threading.Event | None = None,
    rules: Rules | None = None,
) -> Path:
    """Download an http(s) URL to the file `target` and return it; one process at a time per target.

    A target that exists is whole, since it only ever appears by renaming, and is returned at once. Bytes
    collect in `target.partial`, with a journal of finished ranges beside it, so that the next call continues
    after a crash or a lost line; a host without ranges is read in one stream and begun anew. `pget` does the
    work when it is on PATH and nothing was begun, except under `max_bytes`, `headers`, `stop` or `rules`,
    which it does not honour. `rules` are for addresses of strangers, and say themselves when to stop.

    `size` and `max_bytes` are in bytes, `timeout` is the longest silence of the host in seconds. Of the
    `headers`, Authorization and Cookie stay with the first host when it redirects. Raises FetchError (naming
    URL, cause and remedy), NoSpaceError, and Stopped soon after `stop` was set, even at a silent host; what
    cannot be continued is removed first.
    """
    target = Path(target)
    if target.exists():
        return target
    source = Source(url=url, headers=dict(headers or {}), timeout=timeout, rules=rules or until(stop))
    remote = _probe(source)
    _check_length(source, remote.size, size=size, max_bytes=max_bytes)
    part = Part.begun(target, source, remote, trusted=sha256 is not None)
    if remote.size is not None:
        require_free_space(target.parent, remote.size - part.bytes_on_disk())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        progress = Progress(target.name, remote.size, report, done=part.bytes_done())
        free = max_bytes is None and source.rules is None and not headers
        pget = shutil.which("pget") if free and remote.ranges else None
        if not (pget and _fetch_with_pget(pget, source, part, progress)):
            limit = max_bytes if size is None else size
            _fetch_with_python(source, remote, part, progress, max_bytes=limit, connections=connections)
        _verify(source, part, size=remote.size if size is None else size, sha256=sha256)
        os.replace(part.path, target)
    except FetchError as error:
        if not part.done:
            raise
        kept = f"{size_text(part.bytes_done())} are kept in {part.path.name} and will be continued."
        raise FetchError(f"{error} {kept}", status=error.status, headers=error.headers) from error
    except OSError as error:
        part.remove()
        raise disk_error(error, part.path) from error
    except NoSpaceError:
        # The room was there when it was checked: others need the disk now as well.
        part.remove()
        raise
    finally:
        # Kept only when it can be continued.
        if target.exists() or not part.done:
            part.remove()
    return target


def read(
    url: str,
    *,
    max_bytes: int,
    headers: Mapping[str, str] | None = None,
    timeout: float = 30.0,
    rules: Rules | None = None,
) -> bytes:
    """Return a small document whole. Raises FetchError, also when it is longer than `max_bytes`."""
    source = Source(url=url, headers=dict(headers or {}), timeout=timeout, rules=rules)
    patience = Patience(source)
    while True:
        try:
            with source.open() as response:
                body = response.read(max_bytes + 1)
                _check_length(source, len(body), size=None, max_bytes=max_bytes)
                if response.length:
                    raise TruncatedError("the connection ended early")
                return body
        except TRANSIENT as error:
            patience.failed(error)


def remote_size(url: str, *, headers: Mapping[str, str] | None = None, timeout: float = 30.0) -> int | None:
    """Return how many bytes the host announces for `url`, None when it does not say. Raises FetchError."""
    return _probe(Source(url=url, headers=dict(headers or {}), timeout=timeout)).size


def sha256_of(path: Path, *, stop: threading.Event | None = None) -> str:
    """Return the SHA-256 of a file in lower-case hexadecimal. Raises Stopped when `stop` is set."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            check_stop(stop)
            digest.update(block)
    return digest.hexdigest()


def _probe(source: Source) -> Remote:
    # A GET of one byte, not a HEAD: signed addresses are often valid for GET alone.
    patience = Patience(source)
    while True:
        try:
            with source.open({"Range": "bytes=0-0"}) as response:
                validator = _validator(response)
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
                if response.status == 206 and total.isdigit():
                    return Remote(size=int(total), validator=validator, ranges=True)
                length = response.headers.get("Content-Length", "")
                whole = response.status == 200 and length.isdigit()
                return Remote(size=int(length) if whole else None, validator=validator)
        except FetchError as error:
            if error.status == 416:  # an empty file has no first byte
                return Remote()
            raise
        except TRANSIENT as error:
            patience.failed(error)


def _validator(response) -> str | None:  # type: ignore[no-untyped-def]
    return response.headers.get("ETag") or response.headers.get("Last-Modified")


def _check_length(source: Source, length: int | None, *, size: int | None, max_bytes: int | None) -> None:
    if length is None:
        return
    if max_bytes is not None and length > max_bytes:
        raise FetchError(
            f"Cannot download {shown(source.url)}: it is larger than the {size_text(max_bytes)} "
            "that are allowed. Use a smaller file."
        )
    if size is not None and length != size:
        raise FetchError(
            f"Cannot download {shown(source.url)}: it has {length:,} bytes and {size:,} were expected. "
            "The file at this address is another one than was recorded; check the address."
        )


class _RangesLostError(Exception):
    """The host no longer answers range requests for the version of the file that was begun."""


def _fetch_with_python(
    source: Source, remote: Remote, part: Part, progress: Progress, *, max_bytes: int | None, connections: int
) -> None:
    if remote.ranges:
        try:
            return _fetch_ranges(source, remote, part, progress, connections)
        except _RangesLostError:
            progress.report(f"{progress.name}: the host changed its answer; beginning anew in one stream")
            progress.done = 0
            part.remove()
    _fetch_stream(source, part, progress, max_bytes)


def _fetch_with_pget(program: str, source: Source, part: Part, progress: Progress) -> bool:
    """Download with pget; False when there is nothing to gain or it fails: Python shall do it."""
    if part.done or part.size < partial_file.CHUNK_BYTES:
        return False
    # A name of its own: should this process be killed, its pget lives on, and must not write into
    # the file of the next one.
    own = part.path.with_name(f"{part.path.name}.pget-{os.getpid()}")
    limit = 60 + part.size / PGET_SLOWEST_BYTES_PER_SECOND
    try:
        subprocess.run([program, source.url, str(own)], check=True, capture_output=True, timeout=limit)
        size = own.stat().st_size
        if size == part.size:
            os.replace(own, part.path)
            return True
        progress.report(f"{progress.name}: pget left {size:,} of {part.size:,} bytes; continuing without it")
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).decode(errors="replace").strip()[-300:]
        progress.report(f"{progress.name}: pget failed ({said}); continuing without it")
    except (OSError, subprocess.TimeoutExpired) as error:
        progress.report(f"{progress.name}: pget failed ({error}); continuing without it")
    own.unlink(missing_ok=True)
    return False


def _fetch_ranges(source: Source, remote: Remote, part: Part, progress: Progress, connections: int) -> None:
    part.start()
    stop = threading.Event()
    with open(part.path, "r+b") as file, ThreadPoolExecutor(connections) as pool:
        try:
            work = [
                pool.submit(_fetch_range, source, remote, part, file, piece, progress, stop)
                for piece in part.ranges()
            ]
            waiting = set(work)
            while waiting:
                ended, waiting = wait(waiting, timeout=STOP_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                check_stop(source.stop)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _fetch_range(
    source: Source,
    remote: Remote,
    part: Part,
    file: BinaryIO,
    piece: tuple[int, int, int],
    progress: Progress,
    stop: threading.Event,
) -> None:
    index, start, end = piece
    at = start
    patience = Patience(source, stop)
    while not stop.is_set():
        before = at
        try:
            with source.open({"Range": f"bytes={at}-{end - 1}"}) as response:
                if response.headers.get("Content-Range") != f"bytes {at}-{end - 1}/{remote.size}":
                    raise _RangesLostError
                if _validator(response) != remote.validator:
                    raise _RangesLostError
                while (
                    not stop.is_set() and at < end and (block := response.read1(min(BLOCK_BYTES, end - at)))
                ):
                    _write(file, block, at, part.path)
                    at += len(block)
                    progress.add(len(block))
            if at == end:
                return part.finish(index, file)
            raise TruncatedError(f"the connection ended after {at - start:,} of {end - start:,} bytes")
        except TRANSIENT as error:
            # A few bytes before each silence are no progress: such a host would be asked for ever.
            patience.failed(error, progressed=(at - before) * 16 >= end - start)


def _fetch_stream(source: Source, part: Part, progress: Progress, max_bytes: int | None) -> None:
    patience = Patience(source)
    with open(part.path, "wb") as file:
        while True:
            at = 0
            try:
                with source.open() as response:
                    length = response.length
                    while at != length and (block := response.read1(BLOCK_BYTES)):
                        _check_length(source, at + len(block), size=None, max_bytes=max_bytes)
                        _write(file, block, at, part.path)
                        at += len(block)
                        progress.add(len(block))
                if length is None or at == length:
                    os.fdatasync(file.fileno())
                    return
                raise TruncatedError(f"the connection ended after {at:,} of {length:,} bytes")
            except TRANSIENT as error:
                patience.failed(error)
                progress.done = 0
                file.truncate(0)


def _write(file: BinaryIO, block: bytes, at: int, path: Path) -> None:
    try:
        while block:
            written = os.pwrite(file.fileno(), block, at)
            at, block = at + written, block[written:]
    except OSError as error:
        raise disk_error(error, path) from error  # not to be taken for a fault of the line


def _verify(source: Source, part: Part, *, size: int | None, sha256: str | None) -> None:
    """Raise FetchError, after removing the file, unless it has the size and checksum that it should have."""
    found = part.path.stat().st_size
    if size is not None and found != size:
        part.remove()
        raise FetchError(
            f"Cannot download {shown(source.url)}: {found:,} bytes came instead of {size:,}. Start again."
        )
    if sha256 is not None and (digest := sha256_of(part.path, stop=source.stop)) != sha256.lower():
        part.remove()
        raise FetchError(
            f"Cannot download {shown(source.url)}: its SHA-256 is {digest} instead of {sha256.lower()}. "
            "It was damaged on the way or replaced at the host; start again, or check the address."
        )
