"""results.jsonl: a line of JSON for each row of a list. The newest line of a row counts."""

import contextlib
from pathlib import Path
from typing import Any

from lib.batch.messages import ClipResult
from lib.batch.rows import Row
from lib.storage.json_lines import JsonLines

Record = dict[str, Any]


class Results(JsonLines):
    """The results in a file, written as they come."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._records: dict[int, Record] = {}
        for record in self.values():
            with contextlib.suppress(TypeError, KeyError):
                self._records[record["row"]] = record

    def has(self, number: int, fingerprint: str) -> bool:
        """Return whether this row, as the list has it now, was made."""
        record = self._records.get(number, {})
        return record.get("status") == "made" and record.get("fingerprint") == fingerprint

    def add(self, record: Record) -> None:
        """Write a result to the disk before returning. Raises UserError when the disk refuses."""
        self._records[record["row"]] = record
        self.append([record])

    def rewrite(self, rows: list[Row]) -> int:
        """Write one line for each row, in the list's order, and return how many failed. Raises UserError."""
        kept = [self._records[row.number] for row in rows]
        self.replace(kept)
        return sum(record["status"] == "failed" for record in kept)


def result_record(row: Row, result: ClipResult, fingerprint: str) -> Record:
    """Build a row's line: the inputs asked for, the values chosen where none were, and the metrics."""
    record: Record = {"row": row.number, "status": "failed" if result.error else "made"}
    record |= {"error": result.error} if result.error else {"file": row.name}
    return record | row.given | result.metrics | {"fingerprint": fingerprint}
