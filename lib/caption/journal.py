"""The journal of a captioning run: the result of each clip as a line of JSON, for resuming."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from lib.datasets.clips import Clip
from lib.storage.disk import disk_error, replacing

Status = Literal["captioned", "kept", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The result for one clip."""

    file_name: str
    """Its path within the data set, with forward slashes."""
    status: Status
    """captioned by the model, kept (it had a caption), or failed with an error."""
    caption: str = ""
    """The caption without trigger word, prefix and suffix."""
    error: str = ""
    finished: bool = True
    """False where max_new_tokens cut the caption off."""
    fingerprint: str = ""


def fingerprint(clip: Clip, context: object) -> str:
    """Return a hash of a clip's name and size and of what its caption depends on (settings, model)."""
    text = f"{clip.name} {clip.path.stat().st_size} {context}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """An append-only file of rows. Each of several processes has its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def read(self) -> dict[str, Row]:
        """Return the newest row of each file name; damaged and incomplete lines are skipped."""
        found = {}
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return {}
        for line in lines:
            try:
                row = Row(**json.loads(line))
            except (ValueError, TypeError):
                continue
            found[row.file_name] = row
        return found

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and flush them to disk. Raises UserError for a disk error."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab")
                if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
                    self._file.write(b"\n")  # ends the incomplete line of a killed run
            for row in rows:
                self._file.write(_line(row))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Replace the content in one step; without rows, remove the file. Raises UserError."""
        self.close()
        lines = [_line(row) for row in rows]
        if not lines:
            self.path.unlink(missing_ok=True)
            return
        with replacing(self.path) as partial:
            partial.write_bytes(b"".join(lines))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(row: Row) -> bytes:
    # "replace": a lone surrogate, which JSON can contain, cannot be encoded in UTF-8.
    return json.dumps(asdict(row), ensure_ascii=False).encode(errors="replace") + b"\n"
