"""The clips of a data set folder with their captions, and what cannot be used with the reason.

lib/datasets/source.py turns archives and Hub repositories into such a folder.
"""

import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lib.datasets.files import (
    FORMS,
    TABLES,
    VIDEO_ENDINGS,
    VIDEO_FORMS,
    Files,
    UnreadableError,
    read_text,
)
from lib.datasets.listings import Entry, Listing, find_listing, is_text
from lib.errors import UserError

TRANSPORT_STREAMS = frozenset({".ts", ".mts", ".m2ts"})
"""Camcorder recordings, which are not accepted."""
SHOWN = 5
"""How many reasons an error lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A video file and its caption."""

    path: Path
    name: str
    """Its path within the data set, with forward slashes."""
    caption: str
    """Stripped; empty where the clip has none (only without `need_captions`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A file or a row that cannot be used."""

    name: str
    """The file's path within the data set; for a row without a file, the listing and line."""
    reason: str
    """Shown to the user."""


def find_clips(
    folder: Path, *, video_column: str = "", caption_column: str = "", need_captions: bool = True
) -> tuple[list[Clip], list[LeftOut]]:
    """Return the clips in a folder and its subfolders and what is left out, both sorted by name.

    A folder's clips, including those in its subfolders, are listed by the first of these files that exists:
    metadata.jsonl, metadata.csv, videos.txt with prompts.txt. A clip listed twice has the caption of the
    listing higher up. Without a listing each video has its own .txt.

    Args:
        video_column: The table's column of paths, or the name of a .txt with one path a line.
        caption_column: Likewise for captions.
        need_captions: If false, videos without a caption are clips with an empty one. A video whose caption
            exists but cannot be read is still left out, so that the caption is not overwritten.

    Raises:
        UserError: There are no clips, a column is missing, or line counts differ.
    """
    files = Files(Path(folder))
    found: dict[str, Clip | LeftOut] = {}
    listings: dict[str, Listing] = {}
    for directory in files.folders:  # upper folders first
        if listing := find_listing(files, directory, video_column, caption_column, need_captions):
            listings[directory] = listing
            above = set(found)
            for entry in listing.entries:
                _add(entry, directory, files, found, need_captions, above)
    _check_columns(files, listings, video_column, caption_column)
    for name in files.paths:
        if name not in found and (item := _not_listed(name, files, listings, need_captions)) is not None:
            found[name] = item
    clips = sorted((item for item in found.values() if isinstance(item, Clip)), key=lambda clip: clip.name)
    left_out = [item for item in found.values() if isinstance(item, LeftOut)]
    left_out.sort(key=lambda item: item.name)
    if not clips:
        forms = FORMS if need_captions else f"{VIDEO_FORMS}."
        raise UserError(f"{files.root.name} holds no clips: {_contents(files, left_out)}. {forms}")
    return clips, left_out


def full_caption(caption: str, *, trigger_word: str, caption_prefix: str, caption_suffix: str) -> str:
    """Join prefix, trigger word, caption and suffix with single spaces.

    The trigger word is omitted where the other parts already contain it, in either case. No space goes before
    a suffix that begins with punctuation.
    """
    prefix, trigger, suffix = caption_prefix.strip(), trigger_word.strip(), caption_suffix.strip()
    others = " ".join((prefix, caption, suffix))
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", others, re.IGNORECASE):
        trigger = ""
    text = " ".join(part for part in (prefix, trigger, caption.strip()) if part)
    joint = "" if not text or suffix.startswith((",", ".", ";", ":", "!", "?", ")")) else " "
    return f"{text}{joint}{suffix}" if suffix else text


def _check_columns(
    files: Files, listings: dict[str, Listing], video_column: str, caption_column: str
) -> None:
    tables = [listing for listing in listings.values() if PurePosixPath(listing.name).name.lower() in TABLES]
    for option, given in (("video_column", video_column), ("caption_column", caption_column)):
        if given and not is_text(given) and not tables:
            raise UserError(
                f"{files.root.name} has no metadata.jsonl or metadata.csv, so there is no column {given!r}. "
                f"Leave {option} empty."
            )


def _add(
    entry: Entry, directory: str, files: Files, found: dict[str, Clip | LeftOut], need_captions: bool,
    above: set[str],
) -> None:  # fmt: skip
    """Add an entry of a listing to `found`: its clip, or why there is none.

    Files in `above` are listed in an upper folder already, which takes precedence.
    """
    if entry.fault:
        found[entry.where] = LeftOut(name=entry.where, reason=entry.fault)
        return
    if not isinstance(entry.video, str) or not entry.video.strip():
        found[entry.where] = LeftOut(name=entry.where, reason="it does not name a video file")
        return
    try:
        name = files.locate(directory, entry.video)
    except LookupError as error:
        found[entry.where] = LeftOut(name=entry.where, reason=f"{entry.video.strip()}: {error}")
        return
    if name in above:
        return
    if name in found:
        found[entry.where] = LeftOut(name=entry.where, reason=f"{name} is listed more than once")
    elif PurePosixPath(name).suffix.lower() not in VIDEO_ENDINGS:
        allowed = ", ".join(sorted(VIDEO_ENDINGS))
        found[name] = LeftOut(name=name, reason=f"it is not a video file (supported: {allowed})")
    elif not isinstance(entry.caption, str | None):
        found[name] = LeftOut(name=name, reason=f"no caption: {entry.remedy}")
    elif not entry.caption or not entry.caption.strip():
        found[name] = _without_caption(name, files, f"no caption: {entry.remedy}", need_captions)
    else:
        found[name] = Clip(path=files.paths[name], name=name, caption=entry.caption.strip())


def _without_caption(name: str, files: Files, reason: str, need_captions: bool) -> Clip | LeftOut:
    if need_captions:
        return LeftOut(name=name, reason=reason)
    return Clip(path=files.paths[name], name=name, caption="")


def _not_listed(
    name: str, files: Files, listings: dict[str, Listing], need_captions: bool
) -> Clip | LeftOut | None:
    """Return the clip of a file that no listing names, or why it is left out; None if it is not a video."""
    ending = PurePosixPath(name).suffix.lower()
    if ending in TRANSPORT_STREAMS:
        return LeftOut(name=name, reason=f"{ending} files cannot be read: convert it to mp4")
    if ending not in VIDEO_ENDINGS:
        return None
    for above in PurePosixPath(name).parents:
        directory = "" if str(above) == "." else str(above)
        if listing := listings.get(directory):
            reason = f"it is not listed in {listing.name}"
            return _without_caption(name, files, reason, need_captions or not listing.readable)
    own = f"{PurePosixPath(name).with_suffix('')}.txt"
    found = files.in_folder(
        posixpath.dirname(name), f"{posixpath.basename(name)}.txt", posixpath.basename(own)
    )
    if found is None:
        return _without_caption(name, files, f"no caption: write what it shows into {own}", need_captions)
    try:
        caption = read_text(files.paths[found]).strip()
    except UnreadableError as error:
        return LeftOut(name=name, reason=f"no caption: {found} {error}")
    if not caption:
        reason = f"no caption: {found} is empty; write what the clip shows into it"
        return _without_caption(name, files, reason, need_captions)
    return Clip(path=files.paths[name], name=name, caption=caption)


def _contents(files: Files, left_out: list[LeftOut]) -> str:
    if not files.paths:
        return "it is empty"
    counts = Counter(PurePosixPath(name).suffix.lower() or "without an extension" for name in files.paths)
    there = f"it has {', '.join(f'{count} {ending}' for ending, count in counts.most_common(SHOWN))}"
    reasons = "; ".join(f"{item.name}: {item.reason}" for item in left_out[:SHOWN])
    more = f"; and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    return f"{there} ({reasons}{more})" if reasons else there
