"""Captions in the forms that trainers read: a .txt beside each clip, metadata.jsonl, prompts and videos.txt.

lib.dataset.find_clips gets from them exactly the clips and captions that went in.
"""

import json
import os
import threading
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from lib.cancellation import check_stop
from lib.datasets.dataset import CAPTION_LINES, VIDEO_LINES, Clip, LeftOut
from lib.storage.disk import disk_error, require_free_space
from lib.storage.member import BLOCK_BYTES

METADATA, VIDEOS, PROMPTS, ERRORS = "metadata.jsonl", VIDEO_LINES[0], CAPTION_LINES[0], "errors.jsonl"
FILE_NAME, TEXT = "file_name", "text"
"""Columns of METADATA."""


def sidecar_names(names: Iterable[str]) -> dict[str, str]:
    """The .txt of each video: clip.txt, or clip.mp4.txt where another file could be meant by that.

    Names are paths within the data set; all of its videos are to be given. Another file is meant where two
    videos of a folder are called alike but for their ending (or capitals, which not every disk tells apart),
    and by what lists a folder's clips.
    """
    names = list(names)
    short = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in names}
    meant = Counter(_folded(text) for text in short.values())
    meant.update(_folded(f"{name}.txt") for name in names)
    listings = {*VIDEO_LINES, *CAPTION_LINES}
    folders = {_folded(str(above)) for name in names for above in PurePosixPath(name).parents}

    def is_plain(text: str) -> bool:
        own = _folded(text)
        return meant[own] == 1 and own not in folders and PurePosixPath(own).name not in listings

    return {name: text if is_plain(text) else f"{name}.txt" for name, text in short.items()}


def on_one_line(text: str) -> str:
    """Line breaks as blanks."""
    return " ".join(part for line in text.splitlines() if (part := line.strip()))


def json_line(values: dict[str, object]) -> str:
    """A row of a .jsonl."""
    return json.dumps(values, ensure_ascii=False) + "\n"


def lines(texts: Iterable[str]) -> str:
    """A text file of these lines."""
    return "".join(f"{on_one_line(text)}\n" for text in texts)


def errors_text(left_out: list[LeftOut]) -> str:
    """errors.jsonl."""
    return "".join(json_line({FILE_NAME: each.name, "error": each.reason}) for each in left_out)


def encoded(text: str) -> bytes:
    """UTF-8; half a surrogate pair, which JSON can hold, becomes a question mark."""
    return text.encode(errors="replace")


def all_forms(clips: list[Clip], left_out: list[LeftOut]) -> dict[str, str]:
    """File name -> content of everything that is written beside the videos; clips are sorted by name."""
    sidecars = sidecar_names(clip.name for clip in clips)
    forms = {
        METADATA: "".join(json_line({FILE_NAME: clip.name, TEXT: clip.caption}) for clip in clips),
        PROMPTS: lines(clip.caption for clip in clips),
        VIDEOS: lines(clip.name for clip in clips),
    }
    if left_out:
        forms[ERRORS] = errors_text(left_out)
    return forms | {sidecars[clip.name]: f"{clip.caption}\n" for clip in clips}


def pack(
    clips: list[Clip], left_out: list[LeftOut], target: Path, *,
    videos: bool, stop: threading.Event | None = None,
) -> Path:  # fmt: skip
    """Write a new zip with all forms and, with `videos`, the clips under their own names; returns its path.

    Videos do not compress and are stored as they are. The same clips and captions give the same bytes.
    Raises NoSpaceError before anything is written, UserError when the disk refuses, and Stopped; then
    nothing is left.
    """
    partial = target.with_name(f"{target.name}.partial")
    try:
        forms = {name: encoded(text) for name, text in all_forms(clips, left_out).items()}
        size = sum(map(len, forms.values()))
        require_free_space(target, size + sum(clip.path.stat().st_size for clip in clips if videos))
        with zipfile.ZipFile(partial, "w") as archive:
            for name, content in forms.items():
                archive.writestr(_entry(name), content, zipfile.ZIP_DEFLATED)
            for clip in clips if videos else ():
                _add(archive, clip, stop)
        os.replace(partial, target)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _add(archive: zipfile.ZipFile, clip: Clip, stop: threading.Event | None) -> None:
    entry = _entry(clip.name)
    entry.file_size = clip.path.stat().st_size  # by which zipfile chooses the form for large files
    with clip.path.open("rb") as source, archive.open(entry, "w") as member:
        while block := source.read(BLOCK_BYTES):
            check_stop(stop)
            member.write(block)


def _entry(name: str) -> zipfile.ZipInfo:
    """A member without a date of its own, readable for everybody."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o100644 << 16
    return entry


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
