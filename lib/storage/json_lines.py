"""A file of JSON objects, one a line, which a killed process leaves usable."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from lib.storage.disk import disk_error, replacing


class JsonLines:
    """An append-only file of one process. As a context manager it closes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def values(self) -> Iterator[Any]:
        """Yield the values in the file, none without a file; damaged and incomplete lines are skipped."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").split("\n")[:-1]:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            yield value

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records and flush them to disk. Raises UserError for a disk error."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab")
                if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
                    self._file.write(b"\n")  # ends the incomplete line of a killed run
            self._file.writelines(map(_line, records))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error

    def replace(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the content in one step; without records, remove the file. Raises UserError."""
        self.close()
        lines = [_line(record) for record in records]
        if not lines:
            self.path.unlink(missing_ok=True)
            return
        with replacing(self.path) as partial:
            partial.write_bytes(b"".join(lines))

    def close(self) -> None:
        """Close the file, which the next `append` opens again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(record: dict[str, Any]) -> bytes:
    # "replace": a lone surrogate, which JSON can contain, cannot be encoded in UTF-8.
    return json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"
