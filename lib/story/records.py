"""What each file of a story's folder was made from, so that only what is missing or outdated is made again.

A file is one of three things: made from the present inputs; made from others, and so outdated; or a person's
own, if its content is none that was made here. Contents are compared, not dates.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lib.storage.disk import disk_error, replacing

FILE = ".story.json"
State = Literal["missing", "made", "outdated", "own"]


class Records:
    """The files made in a folder: name -> content fingerprint -> fingerprint of its inputs."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if needed, and remove what a killed run left half-written. Raises UserError."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*.partial*"):
                leftover.unlink()
        except OSError as error:
            raise disk_error(error, folder) from error
        self._made: dict[str, dict[str, str]] = {}
        try:
            stored = json.loads((folder / FILE).read_text())
            self._made = {name: dict(made) for name, made in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # without records all files count as a person's own

    def state(self, name: str, inputs: object) -> State:
        """Return what a file is, given the inputs that it would be made from now."""
        path = self.folder / name
        if not path.is_file():
            return "missing"
        made = self._made.get(name, {}).get(content_fingerprint(path))
        if made is None:
            return "own"
        return "made" if made == fingerprint(inputs) else "outdated"

    @contextmanager
    def making(self, name: str, inputs: object) -> Iterator[Path]:
        """Yield a path to write a file to; it gets its name, and is recorded, when the block ends.

        The record comes first: after a kill between both, the old file is still known, as outdated. Raises
        UserError for a disk error.
        """
        target = self.folder / name
        with replacing(target, partial=self.folder / f".{target.stem}.partial{target.suffix}") as partial:
            yield partial
            self._made.setdefault(name, {})[content_fingerprint(partial)] = fingerprint(inputs)
            with replacing(self.folder / FILE, partial=self.folder / f"{FILE}.partial") as record:
                record.write_text(json.dumps(self._made, indent=1))


def fingerprint(inputs: object) -> str:
    """Return a short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def content_fingerprint(path: Path) -> str:
    """Return a short hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
