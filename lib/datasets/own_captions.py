"""Captions in files of the clips' own, and files that may hold captions in a form that is not read."""

import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

from lib.datasets.files import Files, UnreadableError, read_text
from lib.datasets.listings import CAPTION_COLUMNS, CAPTION_LINES, VIDEO_LINES

ENDINGS = (".txt", ".caption", ".json")
CAPTION_FOLDERS = ("labels", "captions", "texts", "prompts", "label", "caption", "text", "prompt")
VIDEO_FOLDERS = ("videos", "clips", "video", "clip")
ONE_CAPTION = ("prompt.txt", "caption.txt", "text.txt", "description.txt", "label.txt", "metadata.json")
"""The caption of a clip that is alone in its folder; so is a file with the folder's name."""
TEXTS = frozenset(
    {
        ".txt",
        ".caption",
        ".captions",
        ".cap",
        ".tags",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".yaml",
        ".yml",
        ".xml",
    }
)
"""Files in which captions are looked for."""
PLAIN_TEXTS = frozenset({".txt", ".caption", ".captions", ".cap", ".tags"})
CLOSED_TABLES = frozenset(
    {".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods", ".db", ".sqlite", ".sqlite3"}
)
"""Tables into which one cannot look without further libraries; so are packed texts."""
PACKED = frozenset({".gz", ".bz2", ".xz", ".zst"})
CLOSED_FILES = frozenset(
    f".{name}"
    for name in (
        *("docx", "doc", "odt", "rtf", "pdf"),
        *("pkl", "pickle", "npy", "npz", "h5", "hdf5", "pt", "pth", "bin"),
    )
)
"""Documents and data that may be captions if their name says so, or is a clip's."""
CAPTION_WORDS = re.compile(r"caption|prompt|label|text|annot|descri|metadata", re.IGNORECASE)
NOT_CAPTIONS = frozenset({"errors.jsonl", *VIDEO_LINES})
DOCUMENTS = ("readme", "license", "licence", "copying", "notice", "changelog", "requirements", "authors")
"""How the names of files begin that are about a data set as a whole."""
MAX_SEARCHED_BYTES = 64 << 20
LETTER = r"(?:[^\W\d_]|[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff])"
"""A letter, or a mark that belongs to one (vowels of India's scripts, accents, points)."""
SENTENCE = re.compile(
    rf"(?<!{LETTER}){LETTER}++(?:,? {LETTER}++){{2}}"
    r"|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{8}|[\u3040-\u9fff\uac00-\ud7af]{4}"
)
"""What makes a text more than a list of names: three words, or some letters of a script without blanks.
A search takes linear time: it starts at words only, and gives no letter back."""
NAME = re.compile(r"""[^"'`,;|:<>()\[\]{}=\t\r\n\\/]+""")
WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCaption:
    """What the caption file of a clip holds."""

    file: str
    text: str = ""
    """Stripped; empty where the file is."""
    fault: str = ""
    """Why it cannot be read; continues the file's name."""


class OwnCaptions:
    """The captions of clips that no listing names."""

    def __init__(self, files: Files, clips: set[str], used: set[str]) -> None:
        """Look for captions of `clips`, which are all clips in `files`; `used` are listings already read."""
        self.files, self.clips, self.used = files, clips, used

    def read(self, name: str) -> OwnCaption | None:
        """Return a clip's caption: the first file with text, else an empty or unreadable one."""
        found = [self._read(file) for file in dict.fromkeys(self._files_of(name))]
        self.used.update(each.file for each in found)
        return next((each for each in found if each.text), None) or next(iter(found), None)

    def unread(self, name: str) -> str | None:
        """Return a file that may hold the clip's caption in a form that is not read.

        To be called when `read` was called for all clips.
        """
        above = {"" if str(parent) == "." else str(parent) for parent in PurePosixPath(name).parents}
        stem, base = PurePosixPath(name).stem.casefold(), posixpath.basename(name).casefold()
        named = (*self._texts.get(stem, ()), *self._texts.get(base, ()))
        for_all = (file for file in self._for_folders if posixpath.dirname(file) in above)
        found = (*for_all, *named, *self._closed.get(stem, ()), *self._closed.get("", ()))
        return next((file for file in found if file not in self.used), None)

    def _is_list_alone(self, file: str) -> bool:
        """Return whether a file has captions line by line, and none tells of which clips."""
        folder, base = posixpath.split(file)
        return base.lower() in CAPTION_LINES and not self.files.in_folder(folder, *VIDEO_LINES)

    def _files_of(self, name: str) -> Iterator[str]:
        folder, base = posixpath.split(name)
        names = [f"{stem}{ending}" for ending in ENDINGS for stem in (base, PurePosixPath(base).stem)]
        places = (place for place in _caption_folders(folder) if place.casefold() in self._folders)
        for place in (folder, *places):
            yield from (file for each in names if (file := self.files.in_folder(place, each)))
        if self._count[folder] == 1:
            found = (self.files.in_folder(folder, each) for each in ONE_CAPTION)
            yield from (file for file in found if file and self._is_of_one_clip(file))
            if folder and self._below[folder] == 1 and folder not in self._without_endings:
                yield from self._files_of_folder(folder)

    def _files_of_folder(self, folder: str) -> Iterator[str]:
        """Return caption files that have the name of a folder: captions/fox.txt for clips/fox/0.mp4."""
        above, base = posixpath.split(folder)
        places = (place for place in _caption_folders(above) if place.casefold() in self._folders)
        for place in (above, *places):
            yield from (file for each in ENDINGS if (file := self.files.in_folder(place, base + each)))

    def _is_of_one_clip(self, file: str) -> bool:
        if file.lower().endswith(".json"):  # many programs write a metadata.json about something else
            return not self._read(file).fault
        return posixpath.basename(file).lower() not in CAPTION_LINES or self._is_list_alone(file)

    def _read(self, file: str) -> OwnCaption:
        try:
            text = read_text(self.files.paths[file]).strip()
        except UnreadableError as error:
            return OwnCaption(file=file, fault=str(error))
        if text and file.lower().endswith(".json"):
            return _from_json(file, text)
        return OwnCaption(file=file, text=text)

    @cached_property
    def _count(self) -> dict[str, int]:
        """How many clips each folder holds itself."""
        count: dict[str, int] = {}
        for name in self.clips:
            folder = posixpath.dirname(name)
            count[folder] = count.get(folder, 0) + 1
        return count

    @cached_property
    def _without_endings(self) -> set[str]:
        return {str(PurePosixPath(name).with_suffix("")) for name in self.clips}

    @cached_property
    def _below(self) -> dict[str, int]:
        """How many clips each folder holds itself and in its subfolders."""
        count: dict[str, int] = {}
        for parent in (str(parent) for name in self.clips for parent in PurePosixPath(name).parents):
            count[parent] = count.get(parent, 0) + 1
        return count

    @cached_property
    def _folders(self) -> set[str]:
        return {folder.casefold() for folder in self.files.folders}

    @cached_property
    def _for_folders(self) -> list[str]:
        """Files that may hold captions of all clips in their folder and below; unreadable ones too."""
        lists = [name for name in self._sentences if self._is_list_alone(name)]
        unreadable = [name for name in self._text_files if self._text(name) is None]
        return [*lists, *unreadable]

    @cached_property
    def _closed(self) -> dict[str, list[str]]:
        """The files that cannot be looked into by the stem of their clip; under "" those of any clip."""
        stems = {PurePosixPath(name).stem.casefold() for name in self.clips}
        found: dict[str, list[str]] = {}
        for file in self.files.paths:
            path = PurePosixPath(file.casefold())
            stem = path.with_suffix("").stem if path.suffix in PACKED else path.stem
            is_table = path.suffix in CLOSED_TABLES
            is_table = is_table or (path.suffix in PACKED and path.with_suffix("").suffix in TEXTS)
            is_named = path.suffix in CLOSED_FILES and (stem in stems or CAPTION_WORDS.search(file))
            if is_table or is_named:
                found.setdefault(stem if stem in stems else "", []).append(file)
        return found

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        """The texts by the clips whose name they have, or that they name beside sentences; case-folded."""
        wanted = {PurePosixPath(name).stem.casefold() for name in self.clips}
        wanted |= {posixpath.basename(name).casefold() for name in self.clips}
        found: dict[str, list[str]] = {}
        for file in self._sentences:
            text = (self._text(file) or "").casefold()
            words = (match[0].strip() for match in NAME.finditer(text))
            names = {word for word in words if word in wanted}
            names |= {match[0] for match in WORD.finditer(text) if match[0] in wanted}
            for name in names:
                found.setdefault(name, []).append(file)
        for file in self._text_files:
            has_words = any(letter.isalpha() for letter in self._text(file) or "")
            is_plain = PurePosixPath(file).suffix.lower() in PLAIN_TEXTS
            if has_words and (is_plain or file in self._sentences):
                found.setdefault(PurePosixPath(file).stem.casefold(), []).append(file)
        return found

    @cached_property
    def _text_files(self) -> list[str]:
        bases = {name: posixpath.basename(name).lower() for name in self.files.paths}
        texts = [name for name, base in bases.items() if PurePosixPath(base).suffix in TEXTS]
        return [
            name
            for name in texts
            if bases[name] not in NOT_CAPTIONS and not bases[name].startswith(DOCUMENTS)
        ]

    @cached_property
    def _sentences(self) -> dict[str, None]:
        """The text files that hold a sentence, in order."""
        return {name: None for name in self._text_files if SENTENCE.search(self._text(name) or "")}

    def _text(self, file: str) -> str | None:
        """Return a file's text, None where it cannot be read."""
        try:
            return read_text(self.files.paths[file], max_bytes=MAX_SEARCHED_BYTES)
        except UnreadableError:
            return None


def _caption_folders(folder: str) -> Iterator[str]:
    """Return the folders whose files belong to the clips of `folder`: labels/a for videos/a, and a/labels."""
    parts = PurePosixPath(folder).parts
    for place in range(len(parts), -1, -1):
        above, below = parts[:place], parts[place:]
        for labels in CAPTION_FOLDERS:
            if below and below[0].lower() in VIDEO_FOLDERS:
                yield posixpath.join(*above, labels, *below[1:])
            yield posixpath.join(*above, labels, *below)


def _from_json(file: str, text: str) -> OwnCaption:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return OwnCaption(file=file, fault="is not JSON")
    if isinstance(value, dict):
        known = {str(key).lower(): content for key, content in value.items()}
        value = next((known[column] for column in CAPTION_COLUMNS if column in known), None)
    if isinstance(value, str):
        return OwnCaption(file=file, text=value.strip())
    allowed = ", ".join(CAPTION_COLUMNS)
    return OwnCaption(file=file, fault=f"has no text under one of the usual names ({allowed})")
