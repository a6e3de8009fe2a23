"""The journal of a captioning run: the result of each clip as a line of JSON, for resuming."""

import contextlib
import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from lib.datasets.clips import Clip
from lib.storage.json_lines import JsonLines

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


class Journal(JsonLines):
    """An append-only file of rows. Each of several processes has its own."""

    def read(self) -> dict[str, Row]:
        """Return the newest row of each file name; damaged and incomplete lines are skipped."""
        found = {}
        for record in self.values():
            with contextlib.suppress(TypeError):
                row = Row(**record)
                found[row.file_name] = row
        return found

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and flush them to disk. Raises UserError for a disk error."""
        self.append(map(asdict, rows))

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Replace the content in one step; without rows, remove the file. Raises UserError."""
        self.replace(map(asdict, rows))
