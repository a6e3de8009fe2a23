"""results.jsonl: a line of JSON for each row of a list. The newest line of a row counts."""

import contextlib
import json
import os
from io import BufferedRandom
from pathlib import Path
from typing import Any

from lib.batch.messages import ClipResult
from lib.batch.rows import Row
from lib.storage.disk import disk_error, replacing

Record = dict[str, Any]


class Results:
    """The results in a file, written as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[int, Record] = {}
        self._file: BufferedRandom | None = None
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # the last one may be cut off
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    record = json.loads(line)
                    self._records[record["row"]] = record

    def has(self, number: int, fingerprint: str) -> bool:
        """Return whether this row, as the list has it now, was made."""
        record = self._records.get(number, {})
        return record.get("status") == "made" and record.get("fingerprint") == fingerprint

    def add(self, record: Record) -> None:
        """Write a result to the disk before returning. Raises UserError when the disk refuses."""
        self._records[record["row"]] = record
        try:
            if self._file is None:
                self._file = self.path.open("ab+")
                if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
                    self._file.write(b"\n")
            self._file.write(_line(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise disk_error(error, self.path) from error

    def rewrite(self, rows: list[Row]) -> int:
        """Write one line for each row, in the list's order, and return how many failed. Raises UserError."""
        self.close()
        kept = [self._records[row.number] for row in rows]
        with replacing(self.path) as partial:
            partial.write_bytes(b"".join(map(_line, kept)))
        return sum(record["status"] == "failed" for record in kept)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def result_record(row: Row, result: ClipResult, fingerprint: str) -> Record:
    """Build a row's line: the inputs asked for, the values chosen where none were, and the metrics."""
    record: Record = {"row": row.number, "status": "failed" if result.error else "made"}
    record |= {"error": result.error} if result.error else {"file": row.name}
    return record | row.given | result.metrics | {"fingerprint": fingerprint}


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"
