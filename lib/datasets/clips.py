"""The clips of a data set folder with their captions, and what cannot be used with the reason.

lib/datasets/source.py turns archives and Hub repositories into such a folder.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lib.datasets.files import (
    FORMS,
    PICTURE_ENDINGS,
    TABLES,
    UNFINISHED,
    VIDEO_ENDINGS,
    VIDEO_FORMS,
    Files,
    counted,
)
from lib.datasets.listings import Entry, Listing, find_listing, is_text
from lib.datasets.own_captions import TEXTS, OwnCaptions
from lib.errors import UserError, cut, shown
from lib.video.file_kind import Kind, file_kind

CLIPS: tuple[Kind, ...] = ("video", "animation")
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
    metadata.jsonl, .csv, .tsv or .json, videos.txt with prompts.txt. A clip listed twice has the caption of
    the listing higher up. Without a listing each video has a caption file of its own: see OwnCaptions.

    Args:
        video_column: The table's column of paths, or the name of a .txt with one path a line.
        caption_column: Likewise for captions.
        need_captions: If false, videos without a caption are clips with an empty one. A video whose caption
            may exist in a form that is not read is still left out, so that it does not get a second one.

    Raises:
        UserError: There are no clips, a column is missing, or line counts differ.
    """
    files = Files(Path(folder))
    finder = _Finder(files, need_captions=need_captions)
    for directory in files.folders:  # upper folders first
        if listing := find_listing(files, directory, video_column, caption_column, need_captions):
            finder.add_listing(directory, listing)
    _check_columns(files, finder.listings, video_column, caption_column)
    finder.add_unlisted()
    finder.add_own_captions()
    clips = sorted((item for item in finder.found.values() if isinstance(item, Clip)), key=lambda c: c.name)
    left_out = [item for item in finder.found.values() if isinstance(item, LeftOut)]
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
                f"{files.root.name} has none of {', '.join(TABLES)}, so there is no column {shown(given)}. "
                f"Leave {option} empty."
            )


class _Finder:
    """Collects clips and what is left out: first from listings, then other files, then own captions."""

    def __init__(self, files: Files, *, need_captions: bool) -> None:
        self.files, self.need_captions = files, need_captions
        self.kinds = {name: _kind(name, path) for name, path in files.paths.items()}
        self.listings: dict[str, Listing] = {}
        """By folder."""
        self.found: dict[str, Clip | LeftOut] = {}
        self.without: dict[str, str] = {}
        """Clips whose listing has no caption for them, with the reason; empty where there is no listing."""
        for name, reason in files.not_read.items():
            self._leave_out(name, reason)

    def add_listing(self, directory: str, listing: Listing) -> None:
        """Add the clips of a listing, except those of a listing in an upper folder, and its faults."""
        self.listings[directory] = listing
        above = {*self.found, *self.without}
        for entry in listing.entries:
            self._add_entry(entry, directory, above)

    def _add_entry(self, entry: Entry, directory: str, above: set[str]) -> None:
        if entry.fault:
            return self._leave_out(entry.where, entry.fault)
        if not isinstance(entry.video, str) or not entry.video.strip():
            return self._leave_out(entry.where, "it does not name a video file")
        try:
            name = self.files.locate(directory, entry.video)
        except LookupError as error:
            return self._leave_out(entry.where, f"{cut(entry.video.strip())}: {error}")
        if name in above:
            return None
        if name in self.found or name in self.without:
            return self._leave_out(entry.where, f"{name} is listed more than once")
        if self.kinds[name] not in CLIPS:
            return self._leave_out(name, "it is not a video file")
        if not isinstance(entry.caption, str | None):
            return self._leave_out(name, f"no caption: {entry.remedy}")
        if not entry.caption or not entry.caption.strip():
            self.without[name] = f"no caption: {entry.remedy}"
            return None
        return self._add_clip(name, entry.caption.strip())

    def add_unlisted(self) -> None:
        """Add the videos that no listing names, and what looks as if it were meant to be one."""
        for name, kind in self.kinds.items():
            if name in self.found or name in self.without:
                continue
            ending = PurePosixPath(name).suffix.lower()
            inner = PurePosixPath(name).with_suffix("").suffix.lower()
            if ending in UNFINISHED and (kind in CLIPS or inner in VIDEO_ENDINGS):
                self._leave_out(
                    name, f"{ending} is an unfinished download: finish it, or rename a complete one"
                )
            elif kind not in CLIPS:
                if not self._is_beside_a_clip(name) and (kind != "other" or self._has_text(name)):
                    what = "not a video file" if kind == "other" else "a picture, not a video"
                    self._leave_out(name, f"it is {what}")
            elif (listing := self._listing_above(name)) and not listing.readable:
                self._leave_out(name, f"it is not listed in {listing.name}")
            else:
                self.without[name] = f"it is not listed in {listing.name}" if listing else ""

    def add_own_captions(self) -> None:
        """Add the clips that no listing has a caption for, with the captions in files of their own."""
        if self.need_captions:  # a listing is complete
            for name, reason in self.without.items():
                if reason:
                    self._leave_out(name, reason)
        names = [name for name in self.without if name not in self.found]
        clips = {name for name, kind in self.kinds.items() if kind in CLIPS}
        listings = [listing.files for listing in self.listings.values()]
        captions = OwnCaptions(self.files, clips, set().union(*listings))
        own = {name: captions.read(name) for name in names}
        for name, caption in own.items():
            place = PurePosixPath(name).with_suffix(".txt")
            if caption and caption.text:
                self._add_clip(name, caption.text)
            elif caption and caption.fault:
                self._leave_out(name, f"no caption: {caption.file} {caption.fault}")
            elif other := captions.unread(name):
                reason = (
                    f"{other} may hold it, but is not read: write it into {place}, or move that file away"
                )
                self._leave_out(name, f"no caption: {reason}")
            elif not self.need_captions:
                self._add_clip(name, "")
            elif caption:
                reason = f"{caption.file} is empty; write what the clip shows into it"
                self._leave_out(name, f"no caption: {reason}")
            else:
                self._leave_out(name, f"no caption: write what it shows into {place}")

    def _add_clip(self, name: str, caption: str) -> None:
        self.found[name] = Clip(path=self.files.paths[name], name=name, caption=caption)

    def _leave_out(self, name: str, reason: str) -> None:
        self.found[name] = LeftOut(name=name, reason=reason)

    def _listing_above(self, name: str) -> Listing | None:
        for above in PurePosixPath(name).parents:
            if listing := self.listings.get("" if str(above) == "." else str(above)):
                return listing
        return None

    def _has_text(self, name: str) -> bool:
        """Return whether a file that is none itself has a text beside it, as a clip has its caption."""
        whole = PurePosixPath(name)
        texts = (f"{name}.txt", str(whole.with_suffix(".txt")))
        return whole.suffix.lower() not in TEXTS and any(text in self.files.paths for text in texts)

    def _is_beside_a_clip(self, name: str) -> bool:
        """Return whether a file has the name of a clip beside it, as posters and sound have."""
        stems = (PurePosixPath(name).with_suffix(""), PurePosixPath(name).with_suffix("").with_suffix(""))
        return any(
            self.kinds.get(f"{stem}{ending}") in CLIPS for stem in stems for ending in ("", *VIDEO_ENDINGS)
        )


def _kind(name: str, path: Path) -> Kind:
    ending = PurePosixPath(name).suffix.lower()
    if ending in VIDEO_ENDINGS:
        return "video"
    try:
        kind = "other" if ending in TEXTS else file_kind(path)
    except OSError:
        kind = "other"
    return "picture" if kind == "other" and ending in PICTURE_ENDINGS else kind


def _contents(files: Files, left_out: list[LeftOut]) -> str:
    if not files.paths:
        return "it is empty"
    there = f"it has {counted(map(PurePosixPath, files.paths), SHOWN)}"
    reasons = "; ".join(f"{item.name}: {item.reason}" for item in left_out[:SHOWN])
    more = f"; and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
    return f"{there} ({reasons}{more})" if reasons else there
