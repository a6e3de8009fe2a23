"""The unfinished file of a download: its identity, the ranges that are on disk, and its progress."""

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self

from lib.network.http import Source, without_secrets
from lib.progress import Report
from lib.storage.disk import size_text

# Long enough that setting up a range request does not matter, short enough that an interruption costs
# seconds; a 21 GB archive is about 660 of them.
CHUNK_BYTES = 32 << 20
REPORT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file as its host describes it: size, a fingerprint of the version, whether it serves ranges."""

    size: int | None = None
    validator: str | None = None
    ranges: bool = False


@dataclass(kw_only=True)
class Part:
    """The unfinished file and the journal of its finished ranges.

    The journal has one line that identifies the download, then one line per finished range. A range is
    written to disk before its line, and a line cut off by a crash does not count.
    """

    path: Path
    journal: Path
    identity: dict[str, object]
    size: int
    done: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def resumed(cls, target: Path, source: Source, remote: Remote, *, verified: bool) -> Self:
        """Return what an earlier call left of the same file, or an empty part.

        `verified`: a checksum will be compared, so a host that does not tell versions apart is resumed too.
        """
        path = target.with_name(target.name + ".partial")
        identity = {"url": without_secrets(source.url), "chunk": CHUNK_BYTES, **vars(remote)}
        part = cls(
            path=path,
            journal=path.with_name(path.name + ".journal"),
            identity=identity,
            size=remote.size or 0,
        )
        if (verified or remote.validator) and path.exists() and part.journal.exists():
            first, *rest = part.journal.read_text(errors="replace").split("\n")
            if first == json.dumps(identity) and path.stat().st_size == part.size:
                # What follows the last line break is empty or cut off.
                part.done = {int(line) for line in rest[:-1] if line.isdecimal()}
        if not part.done:
            part.remove()
        return part

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return the missing ranges: index, first byte, end byte (exclusive)."""
        starts = range(0, self.size, CHUNK_BYTES)
        every = ((index, start, min(start + CHUNK_BYTES, self.size)) for index, start in enumerate(starts))
        return [piece for piece in every if piece[0] not in self.done]

    def bytes_done(self) -> int:
        return self.size - sum(end - start for _, start, end in self.ranges()) if self.done else 0

    def bytes_on_disk(self) -> int:
        return self.path.stat().st_blocks * 512 if self.path.exists() else 0

    def start(self) -> None:
        """Create the journal, and the file at its full size, sparse."""
        with open(self.path, "ab") as file:
            file.truncate(self.size)
        if not self.done:
            self.journal.write_text(json.dumps(self.identity) + "\n")

    def finish(self, index: int, file: BinaryIO) -> None:
        """Record a range whose bytes are all written."""
        os.fdatasync(file.fileno())
        with self.lock:
            with open(self.journal, "a") as journal:
                journal.write(f"{index}\n")
            self.done.add(index)

    def remove(self) -> None:
        self.done.clear()
        for path in (self.path, self.journal, *self.path.parent.glob(self.path.name + ".pget-*")):
            path.unlink(missing_ok=True)


class Progress:
    """Reports the progress of a download every few seconds."""

    def __init__(self, name: str, size: int | None, report: Report, *, done: int) -> None:
        self.name, self.size, self.report = name, size, report
        self.done = done
        self.lock = threading.Lock()
        self.last_time, self.last_done = time.monotonic(), done
        known = size_text(size) if size is not None else "unknown size"
        report(f"{name}: downloading {known}" + (f", continuing at {size_text(done)}" if done else ""))

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            elapsed = time.monotonic() - self.last_time
            if elapsed < REPORT_SECONDS:
                return
            rate = size_text(round(max(self.done - self.last_done, 0) / elapsed))
            self.last_time, self.last_done = time.monotonic(), self.done
            share = (
                f"{self.done / self.size:.0%} of {size_text(self.size)}"
                if self.size
                else size_text(self.done)
            )
            self.report(f"{self.name}: {share}, {rate}/s")

    def move_to(self, position: int) -> None:
        """Set the position of a stream, which starts again at 0 after a failure."""
        self.add(position - self.done)
