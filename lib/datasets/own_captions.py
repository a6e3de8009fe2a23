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
ONE_CAPTION = ("prompt.txt", "caption.txt")
"""The caption of a clip that is alone in its folder."""
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
CLOSED_TABLES = frozenset({".parquet", ".arrow", ".xlsx", ".xls", ".ods"})
"""Tables into which one cannot look without further libraries."""
NOT_CAPTIONS = frozenset({"errors.jsonl", *VIDEO_LINES})
MAX_SEARCHED_BYTES = 64 << 20
SENTENCE = re.compile(r"(?<![^\W\d_])[^\W\d_]++(?:,? [^\W\d_]++){2}|[\u3040-\u9fff\uac00-\ud7af]{6}")
"""What makes a text more than a list of names: three words, or six letters of a script without blanks.
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
        return next((file for file in (*for_all, *named) if file not in self.used), None)

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
        alone = self.files.in_folder(folder, *ONE_CAPTION) if self._count[folder] == 1 else None
        if alone and self._is_list_alone(alone):
            yield alone

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
    def _folders(self) -> set[str]:
        return {folder.casefold() for folder in self.files.folders}

    @cached_property
    def _for_folders(self) -> list[str]:
        """Files that may hold captions of all clips in their folder and below; unreadable ones too."""
        tables = [name for name in self.files.paths if PurePosixPath(name).suffix.lower() in CLOSED_TABLES]
        lists = [name for name in self._sentences if self._is_list_alone(name)]
        unreadable = [name for name in self._text_files if self._text(name) is None]
        return [*tables, *lists, *unreadable]

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        """The files with sentences by the clips that they name, or whose name they have; case-folded."""
        wanted = {PurePosixPath(name).stem.casefold() for name in self.clips}
        wanted |= {posixpath.basename(name).casefold() for name in self.clips}
        found: dict[str, list[str]] = {}
        for file in self._sentences:
            text = (self._text(file) or "").casefold()
            words = (match[0].strip() for match in NAME.finditer(text))
            names = {PurePosixPath(file).stem.casefold(), *(word for word in words if word in wanted)}
            names |= {match[0] for match in WORD.finditer(text) if match[0] in wanted}
            for name in names:
                found.setdefault(name, []).append(file)
        return found

    @cached_property
    def _text_files(self) -> list[str]:
        bases = {name: posixpath.basename(name).lower() for name in self.files.paths}
        texts = [name for name, base in bases.items() if PurePosixPath(base).suffix in TEXTS]
        return [name for name in texts if bases[name] not in NOT_CAPTIONS]

    @cached_property
    def _sentences(self) -> list[str]:
        """The text files that hold a sentence."""
        return [name for name in self._text_files if SENTENCE.search(self._text(name) or "")]

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
