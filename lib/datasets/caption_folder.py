"""Writing captions next to the clips, without losing existing text, or into a separate folder."""

import contextlib
import json
from pathlib import Path

from lib.datasets.caption_files import (
    ERRORS,
    FILE_NAME,
    METADATA,
    PROMPTS,
    TEXT,
    VIDEOS,
    CaptionedDataset,
    caption_files,
    encoded,
    errors_text,
    json_line,
    lines,
    on_one_line,
    sidecar_names,
)
from lib.datasets.clips import Clip
from lib.datasets.files import TABLES, Files, UnreadableError, read_lines, read_table, read_text
from lib.datasets.listings import CAPTION_COLUMNS, CAPTION_LINES, VIDEO_COLUMNS, VIDEO_LINES, column_of
from lib.progress import Report
from lib.storage.disk import disk_error, link_or_copy, replacing


def write_folder(made: CaptionedDataset, folder: Path, *, videos: bool) -> None:
    """Write all caption files and, with `videos`, the clips (as hard links where possible).

    Files of an earlier run are replaced. Raises UserError for a disk error.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for clip in made.clips if videos else ():
            _link_or_copy(clip, folder / clip.name)
        for name, text in caption_files(made).items():
            _write(folder / name, text)
        if not made.left_out:
            _remove_errors(folder / ERRORS)
    except OSError as error:
        raise disk_error(error, folder) from error


def complete_folder(made: CaptionedDataset, folder: Path, *, report: Report) -> None:
    """Add what is missing to the folder of the clips: new captions, and caption files that do not exist.

    Existing text, rows and columns are kept. Only replaced captions are overwritten. Raises UserError for a
    disk error.
    """
    files = Files(folder)
    try:
        _complete_sidecars(made, files)
        _complete_lists(made, files, report)
        _write(folder / METADATA, _completed_table(made, files))
        if made.left_out:
            _write(folder / ERRORS, errors_text(made.left_out))
        else:
            _remove_errors(folder / ERRORS)
    except OSError as error:
        raise disk_error(error, folder) from error


def _complete_sidecars(made: CaptionedDataset, files: Files) -> None:
    names = sidecar_names([*(clip.name for clip in made.clips), *(each.name for each in made.left_out)])
    for clip in made.clips:
        longest = files.find(f"{clip.name}.txt")  # find_clips prefers it
        existing = longest or files.find(names[clip.name])
        if existing is None or (clip.name in made.new and _is_replaceable(files.paths[existing], clip, made)):
            _write(files.root / (longest or names[clip.name]), f"{clip.caption}\n")


def _is_replaceable(path: Path, clip: Clip, made: CaptionedDataset) -> bool:
    if clip.name in made.replaced:
        return True
    try:
        return not read_text(path).strip()
    except UnreadableError:
        return False


def _completed_table(made: CaptionedDataset, files: Files) -> str:
    """Return metadata.jsonl: the rows of the folder's own table with new captions, then the missing clips."""
    clips = {clip.name: clip for clip in made.clips}
    table = files.in_folder("", *TABLES)
    columns, rows = read_table(files.paths[table]) if table else ([], [])
    raw = read_lines(files.paths[table]) if table and table.lower() == METADATA else None
    video = column_of(columns, "", VIDEO_COLUMNS, "", METADATA, needed=False) or FILE_NAME
    caption = column_of(columns, "", CAPTION_COLUMNS, "", METADATA, needed=False) or TEXT
    text = []
    for row in rows:
        name = _located(files, row.values.get(video))
        clip = clips.pop(name, None) if name else None
        if clip and clip.name in made.new:
            text.append(json_line(row.values | {caption: clip.caption}))
        elif raw is not None:
            text.append(f"{raw[row.line - 1]}\n")
        elif not row.fault:
            text.append(json_line(row.values))
    text += [json_line({video: clip.name, caption: clip.caption}) for clip in clips.values()]
    return "".join(text)


def _complete_lists(made: CaptionedDataset, files: Files, report: Report) -> None:
    """Write prompts.txt and videos.txt: their lines with missing captions filled in, then missing clips."""
    clips = {clip.name: clip for clip in made.clips}
    videos, prompts = files.in_folder("", *VIDEO_LINES), files.in_folder("", *CAPTION_LINES)
    paths = read_lines(files.paths[videos]) if videos else []
    texts = read_lines(files.paths[prompts]) if prompts else []
    if bool(videos) != bool(prompts) or len(paths) != len(texts):
        report(
            f"{videos or prompts} does not list this folder's clips: {VIDEOS} and {PROMPTS} are not written"
        )
        return
    for line, path in enumerate(paths):
        clip = clips.pop(_located(files, path) or "", None)
        if clip and (clip.name in made.replaced or not texts[line]):
            texts[line] = on_one_line(clip.caption)
    _write(files.root / (videos or VIDEOS), lines([*paths, *clips]))
    _write(files.root / (prompts or PROMPTS), lines([*texts, *(clip.caption for clip in clips.values())]))


def _located(files: Files, path: object) -> str | None:
    """Return the file that a listing in the folder itself refers to, None if there is none."""
    if not isinstance(path, str) or not path.strip():
        return None
    try:
        return files.locate("", path)
    except LookupError:
        return None


def _remove_errors(path: Path) -> None:
    """Remove an earlier run's errors.jsonl; a file with other content is kept."""
    with contextlib.suppress(OSError, ValueError, AttributeError, UnreadableError):
        if all(json.loads(line).keys() == {FILE_NAME, "error"} for line in read_lines(path)):
            path.unlink()


def _link_or_copy(clip: Clip, target: Path) -> None:
    if target.exists() and target.samefile(clip.path):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        link_or_copy(clip.path, partial)


def _write(path: Path, text: str) -> None:
    """Replace a file in one step, unless it has this content already."""
    content = encoded(text)
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(content)
