"""A folder of videos -> clips with their captions, and what cannot be used with the reason.

`open_data` and `fetch_hub_dataset`, which make such a folder, live in lib/datasets/source.py and are offered
here too.
"""

import posixpath
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lib.datasets.listings import (
    FORMS,
    TABLES,
    VIDEO_ENDINGS,
    VIDEO_FORMS,
    Files,
    UnreadableError,
    read_lines,
    read_table,
    read_text,
)
from lib.datasets.source import fetch_hub_dataset, open_data
from lib.errors import UserError

__all__ = ["Clip", "LeftOut", "fetch_hub_dataset", "find_clips", "full_caption", "open_data"]

TRANSPORT_STREAMS = frozenset({".ts", ".mts", ".m2ts"})
"""What camcorders write, and the decoder refuses."""
VIDEO_LINES, CAPTION_LINES = ("videos.txt",), ("prompts.txt", "prompt.txt")
VIDEO_COLUMNS = ("file_name", "video", "video_path", "file", "path", "media")
CAPTION_COLUMNS = ("text", "caption", "prompt", "description")
SHOWN = 5
"""How many reasons an error lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A video file and what it shows."""

    path: Path
    """On the disk."""
    name: str
    """Its path within the data set, with forward slashes."""
    caption: str
    """As its owner wrote it, without blanks around it; empty when there is none and none is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Something that cannot be used."""

    name: str
    """The file's path within the data set; of a row without a file, where the row is."""
    reason: str
    """Why, in words for its owner."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One line of a listing."""

    where: str
    video: object
    caption: object = None
    remedy: str = ""
    """Where to write the caption when there is none."""
    fault: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """The file that says which clips a folder has."""

    name: str
    entries: list[_Entry]
    readable: bool = True
    """False where its captions, if any, are not known."""


def find_clips(
    folder: Path, *, video_column: str = "", caption_column: str = "", need_captions: bool = True
) -> tuple[list[Clip], list[LeftOut]]:
    """Return the clips at and below a folder and what is left out, both sorted by name.

    In every folder the first of these that is there says which clips it has, for the folders below too:
    metadata.jsonl, metadata.csv, videos.txt with prompts.txt. Where those of two folders name the same clip,
    that of the upper one counts. Elsewhere each video has its own .txt.
    `video_column` and `caption_column` name a table's columns, or, ending in .txt, the line-by-line files.
    Without `need_captions`, videos that have none or are not listed are clips with an empty caption; where
    there is one that cannot be read, the video is left out all the same, so that nobody's words are lost.
    Raises UserError when there is no clip at all, a column is missing, or line counts differ.
    """
    files = Files(Path(folder))
    found: dict[str, Clip | LeftOut] = {}
    listings: dict[str, _Listing] = {}
    for place in files.folders:
        if listing := _listing(files, place, video_column, caption_column, need_captions):
            listings[place] = listing
            above = set(found)
            for entry in listing.entries:
                _take(entry, place, files, found, need_captions, above)
    _check_columns(files, listings, video_column, caption_column)
    for name in files.paths:
        if name not in found and (item := _not_listed(name, files, listings, need_captions)) is not None:
            found[name] = item
    clips = sorted((item for item in found.values() if isinstance(item, Clip)), key=lambda clip: clip.name)
    left_out = [item for item in found.values() if isinstance(item, LeftOut)]
    left_out.sort(key=lambda item: item.name)
    if not clips:
        forms = FORMS if need_captions else f"{VIDEO_FORMS}."
        raise UserError(f"{files.root.name} holds no clips: {_what_there_is(files, left_out)}. {forms}")
    return clips, left_out


def full_caption(caption: str, *, trigger_word: str, caption_prefix: str, caption_suffix: str) -> str:
    """Return prefix, trigger word, caption and suffix, with one blank between them where one belongs.

    The trigger word is left out where it is among the others' words already, in capitals or not.
    """
    prefix, trigger, suffix = caption_prefix.strip(), trigger_word.strip(), caption_suffix.strip()
    others = " ".join((prefix, caption, suffix))
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", others, re.IGNORECASE):
        trigger = ""
    text = " ".join(part for part in (prefix, trigger, caption.strip()) if part)
    joint = "" if not text or suffix.startswith((",", ".", ";", ":", "!", "?", ")")) else " "
    return f"{text}{joint}{suffix}" if suffix else text


def _is_text(column: str) -> bool:
    return column.lower().endswith(".txt")


def _check_columns(
    files: Files, listings: dict[str, _Listing], video_column: str, caption_column: str
) -> None:
    tables = [listing for listing in listings.values() if PurePosixPath(listing.name).name.lower() in TABLES]
    for option, given in (("video_column", video_column), ("caption_column", caption_column)):
        if given and not _is_text(given) and not tables:
            raise UserError(
                f"{files.root.name} has no metadata.jsonl or metadata.csv, so there is no column {given!r}. "
                f"Leave {option} empty."
            )


def _listing(
    files: Files, place: str, video_column: str, caption_column: str, need_captions: bool
) -> _Listing | None:
    """Return the listing in a folder; None where it has none."""
    for table in TABLES:
        if name := files.beside(place, table):
            return _read_table(files.paths[name], name, video_column, caption_column, need_captions)
    videos = files.beside(place, *((video_column,) if _is_text(video_column) else VIDEO_LINES))
    captions = files.beside(place, *((caption_column,) if _is_text(caption_column) else CAPTION_LINES))
    return _read_line_files(files, videos, captions) if videos and captions else None


def _unreadable(listing: str, file: str, error: UnreadableError) -> _Listing:
    return _Listing(
        name=listing, entries=[_Entry(where=file, video=None, fault=f"it {error}")], readable=False
    )


def _read_table(
    path: Path, name: str, video_column: str, caption_column: str, need_captions: bool
) -> _Listing:
    try:
        columns, rows = read_table(path)
    except UnreadableError as error:
        return _unreadable(name, name, error)
    if not columns:
        # Every line is damaged, or there is none.
        rows_at_fault = [_Entry(where=f"{name}, line {r.line}", video=None, fault=r.fault) for r in rows]
        empty = [_Entry(where=name, video=None, fault="it is empty")]
        return _Listing(name=name, entries=rows_at_fault or empty)
    video = column_of(columns, video_column, VIDEO_COLUMNS, "video_column", name)
    caption = column_of(columns, caption_column, CAPTION_COLUMNS, "caption_column", name, need_captions)
    entries = [
        _Entry(
            where=f"{name}, line {row.line}",
            video=row.values.get(video),
            caption=row.values.get(caption),
            remedy=f"write what it shows into column {caption!r} of {name}, line {row.line}",
            fault=row.fault,
        )
        for row in rows
    ]
    return _Listing(name=name, entries=entries)


def column_of(
    columns: list[str], given: str, usual: tuple[str, ...], option: str, table: str, needed: bool = True
) -> str | None:
    """Return the column as the table writes it, or None where none of the usual ones is there or needed.

    Raises UserError for one that is needed, which tells to name it with `option`.
    """
    known = {column.lower(): column for column in reversed(columns)}
    wanted = (given,) if given and not _is_text(given) else usual
    for column in wanted:
        if column in columns or column.lower() in known:
            return column if column in columns else known[column.lower()]
    if wanted == usual and not needed:
        return None
    missing = repr(given) if wanted != usual else f"of the usual names ({', '.join(usual)})"
    raise UserError(
        f"{table} has no column {missing}. It has: {', '.join(columns)}. Name the right one with {option}."
    )


def _read_line_files(files: Files, videos: str, captions: str) -> _Listing:
    lines = []
    for name in (videos, captions):
        try:
            lines.append(read_lines(files.paths[name]))
        except UnreadableError as error:
            return _unreadable(videos, name, error)
    paths, texts = lines
    while paths and not paths[-1]:
        paths.pop()
    while len(texts) > len(paths) and not texts[-1]:
        texts.pop()
    if len(paths) != len(texts):
        raise UserError(
            f"{videos} has {len(paths)} lines and {captions} has {len(texts)}: each line of one names a "
            "video and the same line of the other is its caption, so both need as many."
        )
    entries = [
        _Entry(
            where=f"{videos}, line {number}",
            video=path,
            caption=text,
            remedy=f"write what it shows into line {number} of {captions}",
        )
        for number, (path, text) in enumerate(zip(paths, texts, strict=True), start=1)
    ]
    return _Listing(name=videos, entries=entries)


def _take(
    entry: _Entry, place: str, files: Files, found: dict[str, Clip | LeftOut], need_captions: bool,
    above: set[str],
) -> None:  # fmt: skip
    """Add the clip that a listing's entry names to what was found, or why there is none.

    What the listings of folders `above` say about the same file stands.
    """
    if entry.fault:
        found[entry.where] = LeftOut(name=entry.where, reason=entry.fault)
        return
    if not isinstance(entry.video, str) or not entry.video.strip():
        found[entry.where] = LeftOut(name=entry.where, reason="it names no video file")
        return
    try:
        name = files.locate(place, entry.video)
    except LookupError as error:
        found[entry.where] = LeftOut(name=entry.where, reason=f"{entry.video.strip()}: {error}")
        return
    if name in above:
        return
    if name in found:
        found[entry.where] = LeftOut(name=entry.where, reason=f"{name} is named before already")
    elif PurePosixPath(name).suffix.lower() not in VIDEO_ENDINGS:
        allowed = ", ".join(sorted(VIDEO_ENDINGS))
        found[name] = LeftOut(name=name, reason=f"it is no video that can be read here ({allowed})")
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
    name: str, files: Files, listings: dict[str, _Listing], need_captions: bool
) -> Clip | LeftOut | None:
    """What becomes of a file that no listing names; None for what is no video."""
    ending = PurePosixPath(name).suffix.lower()
    if ending in TRANSPORT_STREAMS:
        return LeftOut(name=name, reason=f"{ending} files cannot be read: convert it to mp4")
    if ending not in VIDEO_ENDINGS:
        return None
    for above in PurePosixPath(name).parents:
        place = "" if str(above) == "." else str(above)
        if listing := listings.get(place):
            reason = f"it is not named in {listing.name}"
            return _without_caption(name, files, reason, need_captions or not listing.readable)
    own = f"{PurePosixPath(name).with_suffix('')}.txt"
    found = files.beside(posixpath.dirname(name), f"{posixpath.basename(name)}.txt", posixpath.basename(own))
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


def _what_there_is(files: Files, left_out: list[LeftOut]) -> str:
    if not files.paths:
        return "it is empty"
    counts = Counter(PurePosixPath(name).suffix.lower() or "without an ending" for name in files.paths)
    there = f"it has {', '.join(f'{count} {ending}' for ending, count in counts.most_common(SHOWN))}"
    reasons = "; ".join(f"{item.name}: {item.reason}" for item in left_out[:SHOWN])
    more = f"; and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    return f"{there} ({reasons}{more})" if reasons else there
