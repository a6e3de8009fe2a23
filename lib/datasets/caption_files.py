"""The files that captions are written to: a .txt for each clip, metadata.jsonl, prompts.txt with videos.txt.

lib.datasets.clips.find_clips reads the same clips and captions back from any of them.
"""

import json
import threading
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lib.cancellation import check_stop
from lib.datasets.clips import Clip, LeftOut
from lib.datasets.listings import CAPTION_LINES, VIDEO_LINES
from lib.storage.disk import replacing, require_free_space
from lib.storage.member import BLOCK_BYTES

METADATA, VIDEOS, PROMPTS, ERRORS = "metadata.jsonl", VIDEO_LINES[0], CAPTION_LINES[0], "errors.jsonl"
FILE_NAME, TEXT = "file_name", "text"
"""Columns of METADATA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedDataset:
    """The clips of a data set with their final captions, and what is left out."""

    clips: list[Clip]
    """Sorted by name."""
    new: frozenset[str]
    """Names of the clips that the model captioned; the others kept their captions."""
    replaced: frozenset[str]
    """Names in `new` of clips that had a caption before."""
    left_out: list[LeftOut]
    cut_off: int
    """How many new captions were cut off at max_new_tokens."""

    @property
    def counts(self) -> dict[str, int]:
        """Return the metrics."""
        new, failed = len(self.new), len(self.left_out)
        return {
            "clips": len(self.clips) + failed, "captioned": new, "kept": len(self.clips) - new,
            "failed": failed,
        }  # fmt: skip


def sidecar_names(names: Iterable[str]) -> dict[str, str]:
    """Return the .txt of each video: clip.txt, or clip.mp4.txt where clip.txt would be ambiguous.

    It is ambiguous where two videos of a folder differ only in their extension or in case, and where it is
    the name of a list. `names` are the paths of all videos of the data set.
    """
    names = list(names)
    short = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in names}
    uses = Counter(_folded(text) for text in short.values())
    uses.update(_folded(f"{name}.txt") for name in names)
    lists = {*VIDEO_LINES, *CAPTION_LINES}
    folders = {_folded(str(parent)) for name in names for parent in PurePosixPath(name).parents}

    def is_unique(text: str) -> bool:
        key = _folded(text)
        return uses[key] == 1 and key not in folders and PurePosixPath(key).name not in lists

    return {name: text if is_unique(text) else f"{name}.txt" for name, text in short.items()}


def on_one_line(text: str) -> str:
    """Replace line breaks by spaces."""
    return " ".join(part for line in text.splitlines() if (part := line.strip()))


def json_line(values: Mapping[str, object]) -> str:
    """Return a line of a .jsonl."""
    return json.dumps(values, ensure_ascii=False) + "\n"


def lines(texts: Iterable[str]) -> str:
    """Return the content of a text file with one line for each text."""
    return "".join(f"{on_one_line(text)}\n" for text in texts)


def errors_text(left_out: list[LeftOut]) -> str:
    """Return the content of errors.jsonl."""
    return "".join(json_line({FILE_NAME: each.name, "error": each.reason}) for each in left_out)


def encoded(text: str) -> bytes:
    """Encode as UTF-8; lone surrogates, which JSON can contain, become question marks."""
    return text.encode(errors="replace")


def caption_files(made: CaptionedDataset) -> dict[str, str]:
    """Return the content of every file but the videos, by its path in the data set."""
    sidecars = sidecar_names(clip.name for clip in made.clips)
    files = {
        METADATA: "".join(json_line({FILE_NAME: clip.name, TEXT: clip.caption}) for clip in made.clips),
        PROMPTS: lines(clip.caption for clip in made.clips),
        VIDEOS: lines(clip.name for clip in made.clips),
    }
    if made.left_out:
        files[ERRORS] = errors_text(made.left_out)
    return files | {sidecars[clip.name]: f"{clip.caption}\n" for clip in made.clips}


def pack(made: CaptionedDataset, target: Path, *, videos: bool, stop: threading.Event | None = None) -> Path:
    """Write a new zip with all caption files and, with `videos`, the clips; return its path.

    Videos are stored uncompressed. The same clips and captions give the same bytes. Raises NoSpaceError
    before anything is written, UserError for a disk error, and Stopped; a failed call leaves no file.
    """
    clips = made.clips if videos else []
    with replacing(target) as partial:
        files = {name: encoded(text) for name, text in caption_files(made).items()}
        size = sum(map(len, files.values())) + sum(clip.path.stat().st_size for clip in clips)
        require_free_space(target, size)
        with zipfile.ZipFile(partial, "w") as archive:
            for name, content in files.items():
                archive.writestr(_entry(name), content, zipfile.ZIP_DEFLATED)
            for clip in clips:
                _add(archive, clip, stop)
    return target


def _add(archive: zipfile.ZipFile, clip: Clip, stop: threading.Event | None) -> None:
    entry = _entry(clip.name)
    entry.file_size = clip.path.stat().st_size  # zipfile uses ZIP64 for large files
    with clip.path.open("rb") as source, archive.open(entry, "w") as member:
        while block := source.read(BLOCK_BYTES):
            check_stop(stop)
            member.write(block)


def _entry(name: str) -> zipfile.ZipInfo:
    """Return a member with a fixed date, readable for everyone."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o100644 << 16
    return entry


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
