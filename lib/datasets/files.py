"""The files of a data set folder: names and paths, and reading tables, lists and captions."""

import codecs
import csv
import io
import json
import os
import posixpath
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lib.errors import UserError

VIDEO_ENDINGS = frozenset(
    f".{name}"
    for name in (
        *("mp4", "mov", "m4v", "mkv", "webm", "avi", "gif", "mpg", "mpeg", "wmv", "flv", "f4v", "3gp", "3g2"),
        *("ogv", "qt", "asf", "vob", "m1v", "m2v", "mpv", "mts", "m2ts", "divx", "xvid", "mxf", "dv", "ivf"),
        *("rm", "rmvb", "apng", "nut", "wtv", "3gpp", "ogm", "m2p", "mk3d", "amv", "bik", "bk2", "smk"),
        *("roq", "y4m", "h264", "264", "h265", "265", "hevc", "avc", "obu", "mjpeg", "mjpg"),
        *("r3d", "braw", "ari", "crm"),
    )
)
"""Other files are videos by their content; .ts is also TypeScript. Some cannot be decoded."""
PICTURE_ENDINGS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".svg"}
)
UNFINISHED = frozenset({".part", ".crdownload", ".download", ".partial", ".tmp", ".!qb", ".aria2"})
"""Endings of files that are still being downloaded."""
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json")
VIDEO_FORMS = "Give videos (.mp4, .mov, .webm, .gif, ...), in folders or not"
FORMS = (
    f"{VIDEO_FORMS}, each with its caption: in a .txt of the same name next to it, in metadata.jsonl, "
    "metadata.csv or metadata.json (columns file_name and text), or line by line in prompts.txt next to "
    "videos.txt."
)
IGNORED = frozenset({"__macosx", "thumbs.db", "desktop.ini"})
MAX_LISTING_BYTES = 256 << 20
MAX_CAPTION_BYTES = 1 << 20


class UnreadableError(Exception):
    """A text file cannot be used; the message continues its name: "is not UTF-8 text: ..."."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One entry of a table."""

    line: int
    """Line number from 1: the last line of a row with line breaks in quoted fields."""
    values: dict[str, object]
    """Values by column: JSON values, or the text of CSV fields."""
    fault: str = ""
    """Why the row has no values."""


def is_ignored(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or an operating system's."""
    return name.startswith(".") or name.lower() in IGNORED


def counted(paths: Iterable[PurePosixPath], most: int = 5) -> str:
    """Return how many files there are by the most frequent endings: "12 .mp4, 1 without an extension"."""
    counts = Counter(path.suffix.lower() or "without an extension" for path in paths)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(most))


class Files:
    """The files in a folder and its subfolders by their paths within it, ignored ones left out.

    Raises UserError if the folder does not exist.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root} is not a folder.")
        self.root = root.absolute()
        self.paths: dict[str, Path] = {}
        self.folders: list[str] = []
        self.not_read: dict[str, str] = {}
        """Folders and links that could not be followed, with the reason."""
        self._walk(self.root)
        self._exact = {unicodedata.normalize("NFC", name): name for name in self.paths}
        self._folded: dict[str, list[str]] = {}
        for key, name in self._exact.items():
            self._folded.setdefault(key.casefold(), []).append(name)

    def _walk(self, root: Path) -> None:
        """Find the files in a folder; links to folders outside of it are followed once."""
        walked: set[tuple[int, int]] = set()
        waiting, links = deque([root]), deque[Path]()
        while waiting or links:
            # Links come last: what lies in the data set itself is found under its own path.
            folder = (waiting or links).popleft()
            try:
                status = folder.stat()
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                self.not_read[_within(self.root, folder)] = f"the folder cannot be read: {error.strerror}"
                continue
            if (status.st_dev, status.st_ino) in walked:
                self.not_read[_within(self.root, folder)] = "it is a link to a folder that is read already"
                continue
            walked.add((status.st_dev, status.st_ino))
            self.folders.append(_within(self.root, folder))
            for entry in entries:
                path = folder / entry.name
                if is_ignored(entry.name):
                    continue
                if path.is_dir():
                    (links if entry.is_symlink() else waiting).append(path)
                elif path.is_file():
                    self.paths[_within(self.root, path)] = path
                elif entry.is_symlink():
                    self.not_read[_within(self.root, path)] = "it is a link to a file that does not exist"
        self.folders.sort(key=lambda name: PurePosixPath(name).parts)
        self.paths = dict(sorted(self.paths.items()))

    def find(self, name: str) -> str | None:
        """Return the name as it is on the disk, which may differ in case and in Unicode normalization."""
        if name in self.paths:
            return name
        key = unicodedata.normalize("NFC", name)
        folded = self._folded.get(key.casefold(), [])
        return self._exact.get(key) or (folded[0] if len(folded) == 1 else None)

    def in_folder(self, directory: str, *names: str) -> str | None:
        """Return the first of these files that exists in a folder itself."""
        found = [self.find(posixpath.join(directory, name)) for name in names]
        return next((name for name in found if name and posixpath.dirname(name) == directory), None)

    def locate(self, directory: str, written: str) -> str:
        """Return the name of the file that a listing in folder `directory` refers to. Raises LookupError."""
        if (exact := posixpath.join(directory, written)) in self.paths:
            return exact  # names may end in a space or contain a backslash
        text = written.strip().replace("\\", "/")
        if text.startswith("/"):
            text = posixpath.relpath(text, self.root)
            directory = ""
        name = posixpath.normpath(posixpath.join(directory, text))
        if name.split("/")[0] == "..":
            raise LookupError("it lies outside of the data set")
        from_root = posixpath.normpath(text)  # some lists in subfolders count from the top
        for each in (name, from_root):
            if found := self.find(each) or self._without_ending(each):
                return found
        raise LookupError("there is no such file in the data set")

    def _without_ending(self, name: str) -> str | None:
        """Return the only video of a name that is written without its ending."""
        names = [self.find(f"{name}{ending}") for ending in VIDEO_ENDINGS]
        found = [each for each in names if each]
        return found[0] if len(found) == 1 else None


def _within(root: Path, path: Path) -> str:
    # Names that are not in the system's encoding could not be printed or stored.
    name = os.fsencode(path.relative_to(root)).decode(errors="backslashreplace")
    return "" if name == "." else name


def read_text(path: Path, *, max_bytes: int = MAX_CAPTION_BYTES) -> str:
    """Return the text of a file in UTF-8 or UTF-16. Raises UnreadableError."""
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnreadableError(f"is larger than {max_bytes >> 20} MiB")
    try:
        return content.decode(_encoding(content))
    except UnicodeDecodeError:
        raise UnreadableError("is not UTF-8 text: save it in that encoding") from None


def _encoding(content: bytes) -> str:
    """Return the encoding that the start of a text shows; programs also write UTF-16 without a mark."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    start = content[:200]
    zeros = [start[place::2].count(0) for place in (0, 1)]
    if max(zeros) * 4 > len(start):
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return "utf-8-sig"


def read_lines(path: Path) -> list[str]:
    """Return a file's lines, stripped. Raises UnreadableError."""
    text = read_text(path, max_bytes=MAX_LISTING_BYTES)
    # str.splitlines would also split at separators that occur within captions.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    return [line.strip() for line in lines]


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """Return the columns and rows of a .jsonl, .json, .csv or .tsv; damaged rows carry a fault.

    A .json holds a list of objects, or a caption or an object for each file name; either may be the only list
    or object in an object. A CSV's first row names the columns; fields are separated by commas, semicolons or
    tabs, and blanks after them are skipped. A first line such as `sep=;` (Excel) names the separator. Raises
    UnreadableError.
    """
    read = {".jsonl": _read_json_lines, ".json": _read_json}.get(path.suffix.lower(), _read_csv)
    return read(path)


def _read_json_lines(path: Path) -> tuple[list[str], list[Row]]:
    rows = [_json_row(number, line) for number, line in enumerate(read_lines(path), start=1) if line]
    return _columns(rows), rows


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _read_json(path: Path) -> tuple[list[str], list[Row]]:
    try:
        value = json.loads(read_text(path, max_bytes=MAX_LISTING_BYTES))
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"is not JSON ({error})") from None
    while isinstance(value, dict):
        inner = [each for each in value.values() if isinstance(each, list | dict)]
        if len(inner) == 1 and not any(isinstance(key, str) and PurePosixPath(key).suffix for key in value):
            value = inner[0]
            continue
        value = [
            {"file_name": name} | (each if isinstance(each, dict) else {"text": each})
            for name, each in value.items()
        ]
    rows = [
        Row(line=number, values=each)
        if isinstance(each, dict)
        else Row(line=number, values={}, fault="the entry is not a JSON object")
        for number, each in enumerate(value if isinstance(value, list) else [], start=1)
    ]
    return _columns(rows), rows


def _json_row(number: int, line: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(line=number, values={}, fault=f"the line is not JSON ({error})")
    if not isinstance(values, dict):
        return Row(line=number, values={}, fault="the line is not a JSON object")
    return Row(line=number, values=values)


def _read_csv(path: Path) -> tuple[list[str], list[Row]]:
    text = read_text(path, max_bytes=MAX_LISTING_BYTES)
    lines = io.StringIO(text, newline="")
    header = lines.readline().rstrip("\r\n")
    skipped = 1 if len(header) == 5 and header.lower().startswith("sep=") else 0
    if not skipped:
        lines.seek(0)
    delimiter = header[4] if skipped else max(",;\t", key=header.count)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: list[str] = []
    rows = []
    line = 0
    try:
        for fields in reader:
            line = reader.line_num + skipped
            if not any(field.strip() for field in fields):
                continue
            if not columns:
                columns = [field.strip() for field in fields]
            elif len(fields) > len(columns):
                fault = (
                    f"the row has {len(fields)} fields and the table {len(columns)} columns: "
                    'put captions with commas in "quotes"'
                )
                rows.append(Row(line=line, values={}, fault=fault))
            else:
                rows.append(Row(line=line, values=dict(zip(columns, fields, strict=False))))
    except csv.Error as error:
        fault = f"the table cannot be read from here on ({error}): is a quote left open?"
        rows.append(Row(line=line + 1, values={}, fault=fault))
    return columns, rows
