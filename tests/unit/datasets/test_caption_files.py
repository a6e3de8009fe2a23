"""Caption files in the formats that trainers read, and reading them back with find_clips."""

import json
import threading
import zipfile
from pathlib import Path

import pytest

from lib.cancellation import Stopped
from lib.datasets.caption_files import CaptionedDataset, caption_files, pack, sidecar_names
from lib.datasets.clips import Clip, LeftOut, find_clips
from lib.storage.archive import extract_archive
from lib.storage.disk import NoSpaceError

AWKWARD = {
    "a.mp4": "a ball", "a.mov": "another ball", "A.gif": "a ball in capitals", "b.mp4": "plain",
    "b.mp4.mp4": "named like the sidecar of another", "deep/a.mp4": "in a folder",
    "deep/er/ü n.mp4": "zwei Wörter",
    "deep/e\u0301.mp4": "decomposed", "deep/\u00e9.mp4": "composed", "prompts.mp4": "named like a list",
    "videos.mp4": "another", "lines.mp4": "one\n\n two\r\nthree\u2028four", "folder.txt/c.mp4": "odd folder",
    "folder.mp4": "next to it", "quoted.mp4": 'she says "no", {then}', "back\\slash.mp4": "of another system",
    "blank .mp4": "a space before the extension",
}  # fmt: skip


def clips_in(folder: Path, captions: dict[str, str]) -> list[Clip]:
    """Write files that look like videos as long as nothing is decoded."""
    clips = []
    for name, caption in sorted(captions.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
        clips.append(Clip(path=path, name=name, caption=caption))
    return clips


def captioned(
    clips: list[Clip], new: str = "", *, replaced: str = "", left_out: list[LeftOut] | None = None
) -> CaptionedDataset:
    """Return a result; `new` and `replaced` are names separated by spaces."""
    return CaptionedDataset(
        clips=clips,
        new=frozenset(new.split()) | frozenset(replaced.split()),
        replaced=frozenset(replaced.split()),
        left_out=left_out or [],
        cut_off=0,
    )


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")


def captions_of(folder: Path) -> dict[str, str]:
    clips, left_out = find_clips(folder)
    assert left_out == []
    return {clip.name: clip.caption for clip in clips}


@pytest.mark.parametrize(
    "formats",
    [
        ("metadata.jsonl",), ("prompts.txt", "videos.txt"), (".txt",),
        (".txt", "metadata.jsonl", "prompts.txt", "videos.txt"),
    ],
    ids=lambda formats: "+".join(formats),
)  # fmt: skip
def test_captions_are_read_back_from_each_format_alone_and_from_all_together(tmp_path, formats):
    clips = clips_in(tmp_path, AWKWARD)
    texts = caption_files(captioned(clips))
    listings = {"metadata.jsonl", "prompts.txt", "videos.txt"}
    sidecars = set(texts) - listings
    assert len(sidecars) == len(clips), "every clip has a sidecar of its own"
    wanted = {name for name in texts if name in formats or (".txt" in formats and name in sidecars)}
    write_texts(tmp_path, {name: texts[name] for name in wanted})
    expected = AWKWARD if "prompts.txt" not in formats[:1] else AWKWARD | {"lines.mp4": "one two three four"}
    assert captions_of(tmp_path) == expected


def test_lists_have_one_line_per_clip_even_if_captions_and_names_have_line_breaks(tmp_path):
    texts = caption_files(captioned(clips_in(tmp_path, {"a.mp4": "one\ntwo", "b\nc.mp4": "three"})))
    assert texts["prompts.txt"] == "one two\nthree\n"
    assert texts["videos.txt"] == "a.mp4\nb c.mp4\n"
    assert [json.loads(line) for line in texts["metadata.jsonl"].splitlines()] == [
        {"file_name": "a.mp4", "text": "one\ntwo"},
        {"file_name": "b\nc.mp4", "text": "three"},
    ]


def test_a_sidecar_keeps_the_video_extension_where_its_name_would_be_ambiguous():
    assert sidecar_names(["x.mp4", "d/x.mov", "d/X.mp4", "d/y.mp4", "d/videos.gif"]) == {
        "x.mp4": "x.txt",
        "d/x.mov": "d/x.mov.txt",
        "d/X.mp4": "d/X.mp4.txt",
        "d/y.mp4": "d/y.txt",
        "d/videos.gif": "d/videos.gif.txt",
    }


def test_a_sidecar_ends_with_a_newline_and_every_error_has_a_row(tmp_path):
    bad = [
        LeftOut(name="bad.mp4", reason="it is empty"),
        LeftOut(name="metadata.csv, line 3", reason="no file"),
    ]
    texts = caption_files(captioned(clips_in(tmp_path, {"a.mp4": "a ball"}), left_out=bad))
    assert texts["a.txt"] == "a ball\n"
    assert texts["errors.jsonl"].splitlines() == [
        '{"file_name": "bad.mp4", "error": "it is empty"}',
        '{"file_name": "metadata.csv, line 3", "error": "no file"}',
    ]
    assert "errors.jsonl" not in caption_files(captioned(clips_in(tmp_path, {"a.mp4": "a ball"})))


def test_a_zip_contains_the_unchanged_clips_and_is_reproducible(tmp_path):
    clips = clips_in(tmp_path / "in", AWKWARD)
    one, other = (pack(captioned(clips), tmp_path / name, videos=True) for name in ("one.zip", "other.zip"))
    assert one.read_bytes() == other.read_bytes()
    with zipfile.ZipFile(one) as archive:
        kinds = {entry.filename: entry.compress_type for entry in archive.infolist()}
    assert {kind for name, kind in kinds.items() if name in AWKWARD} == {zipfile.ZIP_STORED}
    folder = extract_archive(one, tmp_path / "out")
    # In a zip backslashes separate folders.
    assert captions_of(folder) == {name.replace("\\", "/"): text for name, text in AWKWARD.items()}
    assert all(
        (folder / clip.name.replace("\\", "/")).read_bytes() == clip.path.read_bytes() for clip in clips
    )


def test_a_zip_without_videos_contains_only_the_caption_files(tmp_path):
    path = pack(captioned(clips_in(tmp_path, {"a.mp4": "a ball"})), tmp_path / "out.zip", videos=False)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["metadata.jsonl", "prompts.txt", "videos.txt", "a.txt"]


def test_a_lone_surrogate_in_a_kept_caption_is_replaced(tmp_path):
    path = pack(captioned(clips_in(tmp_path, {"a.mp4": "odd \ud83d"})), tmp_path / "out.zip", videos=False)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("a.txt") == b"odd ?\n"


def test_a_stop_or_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    clips = clips_in(tmp_path / "in", {"a.mp4": "a ball"})
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        pack(captioned(clips), tmp_path / "out.zip", videos=True, stop=stop)

    def full(path, needed_bytes, **_):
        raise NoSpaceError("no room")

    monkeypatch.setattr("lib.datasets.caption_files.require_free_space", full)
    with pytest.raises(NoSpaceError, match="no room"):
        pack(captioned(clips), tmp_path / "out.zip", videos=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
