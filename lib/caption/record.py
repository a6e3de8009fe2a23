"""What became of every clip of a data set, one JSON line each, written as soon as it is known.

A run that is killed goes on from here: what a line says is not done again.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lib.datasets.clips import Clip
from lib.storage.disk import disk_error

Status = Literal["captioned", "kept", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One clip."""

    file_name: str
    """Its path within the data set, with forward slashes."""
    status: Status
    """captioned by the model, kept with the caption that it had, failed with an error."""
    caption: str = ""
    """As the model or its owner wrote it, without what is put before and after all captions."""
    error: str = ""
    finished: bool = True
    """False where max_new_tokens cut the caption off."""
    fingerprint: str = ""
    """Of the clip's size and of everything that its caption depends on; see `fingerprint`."""


def fingerprint(clip: Clip, question: object) -> str:
    """Tells whether a row is about this clip and this question (settings, model)."""
    text = f"{clip.name} {clip.path.stat().st_size} {question}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Record:
    """An append-only file of rows; of several processes each has its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = None

    def read(self) -> dict[str, Row]:
        """File name -> its newest row; what a kill cut off in the middle of a line is none."""
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
        """Append rows; on the disk when this returns. Raises UserError when the disk refuses."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab")
                if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
                    self._file.write(b"\n")  # a line that a kill cut off
            for row in rows:
                self._file.write(_line(row))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Hold these rows and no others, in one step; without any, no file. Raises UserError."""
        self.close()
        lines = [_line(row) for row in rows]
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            if lines:
                partial.write_bytes(b"".join(lines))
                os.replace(partial, self.path)
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, self.path) from error
        finally:
            partial.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(row: Row) -> bytes:
    # "replace": half a surrogate pair, which JSON can hold, has no UTF-8.
    return json.dumps(asdict(row), ensure_ascii=False).encode(errors="replace") + b"\n"
