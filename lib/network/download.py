"""Download a large file: in parallel ranges, resumed after interruptions, verified."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

import httpx2

from lib.cancellation import check_stop
from lib.network import hub, partial_file
from lib.network.http import SILENCE_SECONDS, FetchError, Source, copy_body, retry, save
from lib.network.partial_file import Part, Progress, Remote
from lib.network.transport import ANYTHING, STOP_POLL_SECONDS, Rules
from lib.progress import Report
from lib.storage.disk import NoSpaceError, disk_error, partial_path, require_free_space, size_text

BLOCK_BYTES = 1 << 20
# pget waits for ever on a body that stalls: below this rate it is stopped and Python takes over.
PGET_SLOWEST_BYTES_PER_SECOND = 256 << 10


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    max_bytes: int | None = None,
    headers: Mapping[str, str] | None = None,
    report: Report = print,
    timeout: float = SILENCE_SECONDS,
    connections: int = 8,
    rules: Rules = ANYTHING,
) -> Path:
    """Download an http(s) URL to the file `target` and return it; one process at a time per target.

    A target that exists is complete, since it only ever appears by renaming, and is returned at once. Bytes
    collect in `target.partial`, with a journal of finished ranges next to it, so that the next call resumes
    after a crash or a lost connection; a host without ranges is read in one stream from the start. `pget`
    does the work when it is on PATH and nothing has been downloaded yet, except under `max_bytes`, `headers`
    or `rules`, which it does not support.

    Args:
        size: the expected bytes.
        max_bytes: the most that are accepted.
        headers: of these, Authorization and Cookie are dropped when a redirect leads to another host.
        timeout: the longest silence of the host, in seconds.

    Raises:
        FetchError: names the URL, the cause and the remedy.
        NoSpaceError: the disk is too full.
        Stopped: soon after `rules.stop` was set.
    """
    target = Path(target)
    if target.exists():
        return target
    limit = (sys.maxsize if max_bytes is None else max_bytes) if size is None else size
    source = Source(url=url, headers=headers or {}, max_bytes=limit, timeout=timeout, rules=rules)
    remote = _probe(source)
    if size is not None and remote.size not in (size, None):
        raise source.error(
            f"it has {remote.size:,} bytes and {size:,} were expected",
            "The file at this address differs from the recorded one; check the address.",
        )
    source.check_size(remote.size or 0)
    part = Part.resumed(target, source, remote, verified=sha256 is not None)
    if remote.size is not None:
        require_free_space(target.parent, remote.size - part.bytes_on_disk())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        progress = Progress(target.name, remote.size, report, done=part.bytes_done())
        plain = max_bytes is None and rules == ANYTHING and not headers
        pget = shutil.which("pget") if plain and remote.ranges else None
        if not (pget and _fetch_with_pget(pget, source, part, progress)):
            _fetch_with_python(source, remote, part, progress, connections)
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
        part.remove()
        raise
    finally:
        # Kept only when it can be resumed.
        if target.exists() or not part.done:
            part.remove()
    return target


def fetch_repository(
    files: Sequence[hub.HubFile],
    final: Path,
    *,
    headers: Mapping[str, str],
    report: Report,
    rules: Rules,
) -> None:
    """Download files of a Hub repository to the folder `final`, which appears when all are there.

    The next call resumes an interrupted one. Raises as `fetch` does.
    """
    partial = partial_path(final)
    # Partial files are sparse: they have their final length from the start, but not yet all blocks.
    present = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    missing = sum(file.size or 0 for file in files) - present
    require_free_space(partial, missing, hint=", or set COGVIDEOX_CACHE to a folder on another disk")
    for file in files:
        fetch(
            file.url,
            partial / file.path,
            size=file.size,
            sha256=file.sha256,
            headers=headers,
            report=report,
            rules=rules,
        )
    os.replace(partial, final)


def remote_size(url: str) -> int | None:
    """Return how many bytes the host announces for `url`, None when it does not say. Raises FetchError."""
    return _probe(Source(url=url)).size


def sha256_of(path: Path, *, stop: threading.Event | None = None) -> str:
    """Return the SHA-256 of a file in lower-case hexadecimal. Raises Stopped when `stop` is set."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            check_stop(stop)
            digest.update(block)
    return digest.hexdigest()


def _probe(source: Source) -> Remote:
    def attempt() -> Remote:
        # A GET of one byte, not a HEAD: signed addresses are often valid for GET alone.
        with source.get({"Range": "bytes=0-0"}) as response:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if response.status_code == 206 and total.isdigit():
                return Remote(size=int(total), validator=_validator(response), ranges=True)
            length = response.headers.get("Content-Length", "")
            known = response.status_code == 200 and length.isdigit()
            return Remote(size=int(length) if known else None, validator=_validator(response))

    try:
        return retry(source, attempt)
    except FetchError as error:
        if error.status == 416:  # an empty file has no first byte
            return Remote()
        raise


def _validator(response: httpx2.Response) -> str | None:
    return response.headers.get("ETag") or response.headers.get("Last-Modified")


class _ChangedError(Exception):
    """The host no longer answers range requests for the same version of the file."""


def _fetch_with_python(
    source: Source, remote: Remote, part: Part, progress: Progress, connections: int
) -> None:
    if remote.ranges:
        try:
            return _fetch_ranges(source, remote, part, progress, connections)
        except _ChangedError:
            progress.report(f"{progress.name}: the host changed its answer; starting again in one stream")
            part.remove()
    save(source, part.path, moved=progress.move_to)


def _fetch_with_pget(program: str, source: Source, part: Part, progress: Progress) -> bool:
    """Download with pget and return True, or False when Python should do it: pget failed or gains nothing."""
    if part.done or part.size < partial_file.CHUNK_BYTES:
        return False
    # A file of its own: if this process is killed, its pget lives on and must not write into the file of
    # the next one.
    own = part.path.with_name(f"{part.path.name}.pget-{os.getpid()}")
    limit = 60 + part.size / PGET_SLOWEST_BYTES_PER_SECOND
    try:
        subprocess.run([program, source.url, str(own)], check=True, capture_output=True, timeout=limit)
        size = own.stat().st_size
        if size == part.size:
            os.replace(own, part.path)
            return True
        failure = f"left {size:,} of {part.size:,} bytes"
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout).decode(errors="replace").strip()[-300:]
        failure = f"failed ({output})"
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = f"failed ({error})"
    progress.report(f"{progress.name}: pget {failure}; continuing without it")
    own.unlink(missing_ok=True)
    return False


def _fetch_ranges(source: Source, remote: Remote, part: Part, progress: Progress, connections: int) -> None:
    part.start()
    stop = threading.Event()
    with open(part.path, "r+b") as file, ThreadPoolExecutor(connections) as pool:
        try:
            waiting = {
                pool.submit(_fetch_range, source, remote, part, file, piece, progress, stop)
                for piece in part.ranges()
            }
            while waiting:
                ended, waiting = wait(waiting, timeout=STOP_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                check_stop(source.rules.stop)
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
    at = before = start

    def moved(to: int) -> None:
        nonlocal at
        check_stop(stop)
        progress.add(to - at)
        at = to

    def attempt() -> None:
        nonlocal before
        check_stop(stop)
        check_stop(source.rules.stop)
        before = at
        with source.get({"Range": f"bytes={at}-{end - 1}"}) as response:
            expected = f"bytes {at}-{end - 1}/{remote.size}"
            same = response.headers.get("Content-Range") == expected
            if not same or _validator(response) != remote.validator:
                raise _ChangedError
            if not copy_body(response, file, start=at, end=end, moved=moved) or at < end:
                raise _ChangedError

    # A few bytes before each silence are not progress: such a host would be asked for ever.
    retry(source, attempt, stop=stop, progressed=lambda: (at - before) * 16 >= end - start)
    part.finish(index, file)


def _verify(source: Source, part: Part, *, size: int | None, sha256: str | None) -> None:
    """Raise FetchError, after removing the file, unless it has the expected size and checksum."""
    found = part.path.stat().st_size
    if size is not None and found != size:
        part.remove()
        raise source.error(f"{found:,} bytes arrived instead of {size:,}", "Start again.")
    if sha256 is not None and (digest := sha256_of(part.path, stop=source.rules.stop)) != sha256.lower():
        part.remove()
        raise source.error(
            f"its SHA-256 is {digest} instead of {sha256.lower()}",
            "It was damaged in transit or replaced at the host; start again, or check the address.",
        )
