"""Lists of clips, one row each: read from .txt, .csv or .jsonl and checked before anything starts."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.datasets.files import UnreadableError, read_lines, read_table
from lib.errors import UserError
from lib.serving.inputs import input_properties, parse_inputs

ENDINGS = (".txt", ".csv", ".jsonl")
TEXT_PATHS = ("lora_weights", "extra_lora")
"""Text inputs that may be paths on this machine."""
MAX_LIST_BYTES = 64 * 2**20

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One clip of a list."""

    number: int
    """Number of the row, from 1."""
    inputs: dict[str, Any]
    """All of the predictor's inputs."""
    given: dict[str, Any]
    """The inputs that the list and the command line set."""

    @property
    def name(self) -> str:
        """Return the name of the clip's file."""
        return f"{self.number:05d}.{self.inputs['output_format']}"

    def fingerprint(self, model: str) -> str:
        """Return a hash of number, inputs and model: an earlier result with the same one is of this row."""
        facts = json.dumps([self.number, self.inputs, model], sort_keys=True)
        return hashlib.sha256(facts.encode(errors="replace")).hexdigest()[:16]


def read_rows(path: Path, *, common: list[str], document: Document) -> list[Row]:
    """Read the rows of a list; `common` (input=value) applies to rows that do not set the input themselves.

    A .txt has a prompt on each line, a .csv a column and a .jsonl a key for each input; empty lines, empty
    cells and null set nothing. They are read as listings of data sets are. Paths in a
    list are relative to its folder. Raises UserError naming the row.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"prompts={path} is not a supported list: use {', '.join(ENDINGS)}.")
    shared = dict(pair.split("=", 1) for pair in common)
    rows = []
    for number, found in enumerate(_entries(path), start=1):
        try:
            own = {name: _from_list(name, text, path.parent, document) for name, text in found.items()}
            rows.append(resolve_row(shared | own, number=number, document=document))
        except UserError as error:
            raise UserError(f"{path.name}, row {number}: {error}") from error
    if not rows:
        raise UserError(f"{path} contains no prompts.")
    return rows


def resolve_row(texts: dict[str, str], *, number: int, document: Document) -> Row:
    """Build a row with every input of the predictor, the default where none is set. Raises UserError."""
    given = parse_inputs([f"{name}={text}" for name, text in texts.items()], document, send_files=False)
    properties = input_properties(document)
    for name, shape in properties.items():
        if shape.get("format") == "uri" and name in given:
            given[name] = str(_local_file(name, given[name]))
    defaults = {name: shape.get("default") for name, shape in properties.items()}
    return Row(number=number, inputs=defaults | given, given=given)


def _entries(path: Path) -> Iterator[dict[str, str]]:
    """Yield each row as input name -> text, as on a command line."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(
                f"{path} is too large for a list of prompts: at most {MAX_LIST_BYTES // 2**20} MiB are read."
            )
        if path.suffix.lower() == ".txt":
            yield from ({"prompt": line} for line in read_lines(path) if line)
            return
        _, rows = read_table(path)
    except OSError as error:
        raise UserError(f"prompts={path} cannot be read: {error.strerror or error}.") from error
    except UnreadableError as error:
        raise UserError(f"prompts={path} {error}.") from error
    for row in rows:
        if row.fault:
            raise UserError(f"{path.name}, line {row.line}: {row.fault}.")
        yield {name: _as_text(value) for name, value in row.values.items() if value not in (None, "")}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _from_list(name: str, text: str, folder: Path, document: Document) -> str:
    """Resolve a path relative to the list's folder; leave other texts as they are."""
    shape = input_properties(document).get(name, {})
    if shape.get("format") != "uri" and name not in TEXT_PATHS:
        return text
    path = folder / text.removeprefix("@")
    return str(path.resolve()) if "://" not in text and path.exists() else text


def _local_file(name: str, text: str) -> Path:
    if "://" in text or text.startswith("data:"):
        raise UserError(f"{name}: use a file on this machine, not an address.")
    path = Path(text).expanduser()
    if not path.is_file():
        raise UserError(f"{name}: there is no file {text}.")
    return path.resolve()
