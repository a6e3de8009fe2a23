"""Listings of clips in a folder: metadata.jsonl, .csv, .tsv or .json, or videos.txt with prompts.txt."""

from dataclasses import dataclass
from pathlib import Path

from lib.datasets.files import TABLES, Files, UnreadableError, read_lines, read_table
from lib.errors import UserError, shown

VIDEO_LINES = ("videos.txt",)
CAPTION_LINES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEO_COLUMNS = ("file_name", "video", "video_path", "file", "path", "media")
CAPTION_COLUMNS = ("text", "caption", "prompt", "description")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of a listing."""

    where: str
    video: object
    caption: object = None
    remedy: str = ""
    """Where to write a missing caption."""
    fault: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The file that lists the clips of a folder."""

    name: str
    entries: list[Entry]
    readable: bool = True
    """False where the file cannot be read, so that its captions are unknown."""
    files: frozenset[str] = frozenset()
    """The files whose captions are all in `entries`: none where a row is damaged."""


def find_listing(
    files: Files, directory: str, video_column: str, caption_column: str, need_captions: bool
) -> Listing | None:
    """Return the folder's own listing, None where it has none."""
    for table in TABLES:
        if name := files.in_folder(directory, table):
            if name.lower().endswith(".json") and not _lists_files(files, directory, name):
                continue  # many programs write a metadata.json about something else
            return _read_table(files.paths[name], name, video_column, caption_column, need_captions)
    videos = files.in_folder(directory, *((video_column,) if is_text(video_column) else VIDEO_LINES))
    captions = files.in_folder(directory, *((caption_column,) if is_text(caption_column) else CAPTION_LINES))
    return _read_line_files(files, videos, captions) if videos and captions else None


def _lists_files(files: Files, directory: str, table: str) -> bool:
    """Return whether a table has captions and names files of the data set."""
    try:
        columns, rows = read_table(files.paths[table])
    except UnreadableError:
        return False
    names = [row.values.get(known_column(columns, VIDEO_COLUMNS) or "") for row in rows]
    found = any(isinstance(name, str) and _is_there(files, directory, name) for name in names)
    return found and known_column(columns, CAPTION_COLUMNS) is not None


def _is_there(files: Files, directory: str, name: str) -> bool:
    try:
        return bool(files.locate(directory, name))
    except LookupError:
        return False


def _unreadable(listing: str, file: str, error: UnreadableError) -> Listing:
    return Listing(name=listing, entries=[Entry(where=file, video=None, fault=f"it {error}")], readable=False)


def _read_table(
    path: Path, name: str, video_column: str, caption_column: str, need_captions: bool
) -> Listing:
    unit = "entry" if path.suffix.lower() == ".json" else "line"
    try:
        columns, rows = read_table(path)
    except UnreadableError as error:
        return _unreadable(name, name, error)
    if not columns:
        damaged = [Entry(where=f"{name}, {unit} {r.line}", video=None, fault=r.fault) for r in rows]
        empty = [Entry(where=name, video=None, fault="it is empty")]
        return Listing(name=name, entries=damaged or empty)
    video = column_of(columns, video_column, VIDEO_COLUMNS, "video_column", name)
    caption = column_of(columns, caption_column, CAPTION_COLUMNS, "caption_column", name, need_captions)
    entries = [
        Entry(
            where=f"{name}, {unit} {row.line}",
            video=row.values.get(video or ""),
            caption=row.values.get(caption) if caption else None,
            remedy=f"write what it shows into column {shown(caption)} of {name}, {unit} {row.line}",
            fault=row.fault,
        )
        for row in rows
    ]
    whole = caption and not any(row.fault for row in rows)
    return Listing(name=name, entries=entries, files=frozenset({name} if whole else ()))


def column_of(
    columns: list[str], given: str, usual: tuple[str, ...], option: str, table: str, needed: bool = True
) -> str | None:
    """Return the table's spelling of the `given` column, or of the first `usual` one it has.

    None where it has none of the usual ones and none is `needed`. Raises UserError, which refers to `option`,
    for a needed or given column that is missing.
    """
    wanted = (given,) if given and not is_text(given) else usual
    if found := known_column(columns, wanted):
        return found
    if wanted == usual and not needed:
        return None
    missing = repr(given) if wanted != usual else f"of the usual names ({', '.join(usual)})"
    raise UserError(
        f"{table} has no column {missing}. It has: {', '.join(columns)}. Name the right one with {option}."
    )


def known_column(columns: list[str], names: tuple[str, ...]) -> str | None:
    """Return the table's spelling of the first of these names that it has, None where it has none."""
    known = {column.lower(): column for column in reversed(columns)}
    return next(
        (name if name in columns else known[name.lower()] for name in names if name.lower() in known), None
    )


def _read_line_files(files: Files, videos: str, captions: str) -> Listing:
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
            f"{videos} has {len(paths)} lines and {captions} has {len(texts)}: line N of {captions} is the "
            f"caption of the video in line N of {videos}, so both need the same number of lines."
        )
    entries = [
        Entry(
            where=f"{videos}, line {number}",
            video=path,
            caption=text,
            remedy=f"write what it shows into line {number} of {captions}",
        )
        for number, (path, text) in enumerate(zip(paths, texts, strict=True), start=1)
    ]
    return Listing(name=videos, entries=entries, files=frozenset({videos, captions}))


def is_text(column: str) -> bool:
    return column.lower().endswith(".txt")
