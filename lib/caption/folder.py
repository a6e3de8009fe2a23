"""Captions into folders: beside the clips, where no words of others may be lost, or into one of their own."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from lib.caption.dataset import Captioned
from lib.caption.forms import (
    ERRORS,
    FILE_NAME,
    METADATA,
    PROMPTS,
    TEXT,
    VIDEOS,
    all_forms,
    encoded,
    errors_text,
    json_line,
    lines,
    on_one_line,
    sidecar_names,
)
from lib.datasets.dataset import (
    CAPTION_COLUMNS,
    CAPTION_LINES,
    TABLES,
    VIDEO_COLUMNS,
    VIDEO_LINES,
    Clip,
    column_of,
)
from lib.datasets.listings import Files, UnreadableError, read_lines, read_table, read_text
from lib.progress import Report
from lib.storage.disk import disk_error, require_free_space


def write_folder(made: Captioned, folder: Path, *, videos: bool) -> None:
    """Write all forms and, with `videos`, the clips (as links to the same files where that can be).

    What an earlier run wrote is replaced. Raises UserError when the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for clip in made.clips if videos else ():
            _place(clip, folder / clip.name)
        for name, text in all_forms(made.clips, made.left_out).items():
            _write(folder / name, text)
        if not made.left_out:
            _remove_errors(folder / ERRORS)
    except OSError as error:
        raise disk_error(error, folder) from error


def complete_folder(made: Captioned, folder: Path, *, report: Report) -> None:
    """Write what the clips in a folder lack: the captions that are new, and forms that are not there.

    A text that is there stays, as do rows and columns of tables; only what was captioned anew (where that was
    asked for: in place of a caption) is put over it. Raises UserError when the disk refuses.
    """
    files = Files(folder)
    try:
        _complete_sidecars(made, files)
        _complete_lines(made, files, report)
        _write(folder / METADATA, _completed_table(made, files))
        if made.left_out:
            _write(folder / ERRORS, errors_text(made.left_out))
        else:
            _remove_errors(folder / ERRORS)
    except OSError as error:
        raise disk_error(error, folder) from error


def _complete_sidecars(made: Captioned, files: Files) -> None:
    names = sidecar_names([*(clip.name for clip in made.clips), *(each.name for each in made.left_out)])
    for clip in made.clips:
        longest = files.find(f"{clip.name}.txt")  # the first that is looked at
        there = longest or files.find(names[clip.name])
        if there is None or (clip.name in made.new and _may_be_replaced(files.paths[there], clip, made)):
            _write(files.root / (longest or names[clip.name]), f"{clip.caption}\n")


def _may_be_replaced(path: Path, clip: Clip, made: Captioned) -> bool:
    if clip.name in made.replaced:
        return True
    try:
        return not read_text(path).strip()
    except UnreadableError:
        return False


def _completed_table(made: Captioned, files: Files) -> str:
    """metadata.jsonl: the rows of the folder's own table, with new captions, then clips that it lacks."""
    clips = {clip.name: clip for clip in made.clips}
    table = files.beside("", *TABLES)
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
    return "".join(
        [*text, *(json_line({video: clip.name, caption: clip.caption}) for clip in clips.values())]
    )


def _complete_lines(made: Captioned, files: Files, report: Report) -> None:
    """prompts.txt and videos.txt: their lines, captions where there is none, then clips that they lack."""
    clips = {clip.name: clip for clip in made.clips}
    videos, prompts = files.beside("", *VIDEO_LINES), files.beside("", *CAPTION_LINES)
    paths = read_lines(files.paths[videos]) if videos else []
    texts = read_lines(files.paths[prompts]) if prompts else []
    if bool(videos) != bool(prompts) or len(paths) != len(texts):
        report(f"{videos or prompts} is another list than ours: {VIDEOS} and {PROMPTS} are not written")
        return
    for place, written in enumerate(paths):
        clip = clips.pop(_located(files, written), None)
        if clip and (clip.name in made.replaced or not texts[place]):
            texts[place] = on_one_line(clip.caption)
    _write(files.root / (videos or VIDEOS), lines([*paths, *clips]))
    _write(
        files.root / (prompts or PROMPTS), lines([*texts, *(clip.caption for clip in clips.values())])
    )  # fmt: skip


def _located(files: Files, written: object) -> str | None:
    """The file that a listing in the folder itself names, if it is there."""
    if not isinstance(written, str) or not written.strip():
        return None
    try:
        return files.locate("", written)
    except LookupError:
        return None


def _remove_errors(path: Path) -> None:
    """Remove what an earlier run wrote; a file of another kind stays."""
    with contextlib.suppress(OSError, ValueError, AttributeError, UnreadableError):
        if all(json.loads(line).keys() == {FILE_NAME, "error"} for line in read_lines(path)):
            path.unlink()


def _place(clip: Clip, target: Path) -> None:
    """The clip under another path: the same file where both are on one disk, else a copy."""
    if target.exists() and target.samefile(clip.path):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        try:
            os.link(clip.path.resolve(), partial)
        except OSError:  # another disk, or one without links
            require_free_space(target, clip.path.stat().st_size)
            shutil.copyfile(clip.path, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """In one step; a file that says so already is not touched."""
    content = encoded(text)
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
