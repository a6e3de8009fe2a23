"""From what people give to clips with captions, with every refusal in words."""

import json
import os
import tarfile
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from lib.datasets import source
from lib.datasets.dataset import Clip, fetch_hub_dataset, find_clips, full_caption, open_data
from lib.errors import UserError
from lib.network import http, partial_file
from lib.video.reader import write_video
from tests.http_host import Host, Served, hub_of
from training.clips import Sampling, clip_samples

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FORMS = (
    "Give videos (.mp4, .mov, .webm, .gif, ...), in folders or not, each with its caption: in a .txt of the "
    "same name beside it, in metadata.jsonl or metadata.csv (columns file_name and text), or line by line in "
    "prompts.txt beside videos.txt."
)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body if isinstance(body, bytes) else body.encode())
    folder.mkdir(exist_ok=True)
    return folder


def captions(folder: Path, **columns: str) -> dict[str, str]:
    return {clip.name: clip.caption for clip in find_clips(folder, **columns)[0]}


def reasons(folder: Path, **columns: str) -> dict[str, str]:
    return {item.name: item.reason for item in find_clips(folder, **columns)[1]}


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# Each video with its own text


def test_each_video_goes_with_the_text_of_its_name_in_any_folder_and_case(tmp_path):
    folder = write(
        tmp_path / "clips",
        {
            "B.MP4": b"v", "B.txt": " a ball \r\n",
            "a.mov": b"v", "a.TXT": "\ufeffan apple",
            "c.webm": b"v", "c.webm.txt": "a cat",
            "wrapped/B.mp4": b"v", "wrapped/B.txt": "another ball",
            "wrapped/deep/d.Gif": b"v", "wrapped/deep/d.txt": "zwei W\u00f6rter",
        },
    )  # fmt: skip
    clips, left_out = find_clips(folder)
    assert left_out == []
    assert clips[0] == Clip(path=folder / "B.MP4", name="B.MP4", caption="a ball")
    assert [(clip.name, clip.caption) for clip in clips] == [
        ("B.MP4", "a ball"),
        ("a.mov", "an apple"),
        ("c.webm", "a cat"),
        ("wrapped/B.mp4", "another ball"),
        ("wrapped/deep/d.Gif", "zwei W\u00f6rter"),
    ]
    assert all(clip.path == folder / clip.name for clip in clips)


def test_what_systems_leave_behind_is_no_clip(tmp_path):
    junk = dict.fromkeys(
        ["__MACOSX/._a.mp4", "__MACOSX/b.mp4", "._a.mp4", ".DS_Store", "Thumbs.db", ".hidden/c.mp4"], b"x"
    )
    folder = write(tmp_path / "clips", {**junk, "a.mp4": b"v", "a.txt": "a", "README.md": b"hello"})
    assert find_clips(folder) == ([Clip(path=folder / "a.mp4", name="a.mp4", caption="a")], [])


def test_clips_without_a_caption_are_left_out_and_told_which_file_to_write(tmp_path):
    folder = write(
        tmp_path / "clips",
        {
            "good.mp4": b"v", "good.txt": "good",
            "x/none.mp4": b"v",
            "x/empty.mp4": b"v", "x/empty.txt": " \n",
            "latin.mp4": b"v", "latin.txt": "gr\u00fcn".encode("latin-1"),
            "huge.mp4": b"v", "huge.txt": b"x" * ((1 << 20) + 1),
            "wide.mp4": b"v", "wide.txt": "in UTF-16".encode("utf-16"),
            "camera.MTS": b"v", "camera.txt": "a lake",
        },
    )  # fmt: skip
    assert captions(folder) == {"good.mp4": "good", "wide.mp4": "in UTF-16"}
    assert reasons(folder) == {
        "camera.MTS": ".mts files cannot be read: convert it to mp4",
        "huge.mp4": "no caption: huge.txt is larger than 1 MiB",
        "latin.mp4": "no caption: latin.txt is not UTF-8 text: save it in that encoding",
        "x/empty.mp4": "no caption: x/empty.txt is empty; write what the clip shows into it",
        "x/none.mp4": "no caption: write what it shows into x/none.txt",
    }


# Tables


@pytest.mark.parametrize("video", ["file_name", "video", "video_path", "file", "path", "media"])
@pytest.mark.parametrize("caption", ["text", "caption", "prompt", "description"])
def test_the_usual_columns_are_found(tmp_path, video, caption):
    rows = jsonl({"id": 1, caption: "a ball", video: "a.mp4"})
    folder = write(tmp_path / "1", {"a.mp4": b"v", "metadata.jsonl": rows})
    assert captions(folder) == {"a.mp4": "a ball"}
    table = f"\ufeffid,{caption.upper()},{video}\r\n1,a ball,a.mp4\r\n"
    folder = write(tmp_path / "2", {"a.mp4": b"v", "metadata.csv": table})
    assert captions(folder) == {"a.mp4": "a ball"}


def test_the_first_usual_column_wins_and_a_named_one_before_it(tmp_path):
    row = {"prompt": "p", "text": "t", "mine": "m", "other": "b.mp4", "video": "a.mp4"}
    folder = write(tmp_path / "clips", {"a.mp4": b"v", "b.mp4": b"v", "metadata.jsonl": jsonl(row)})
    assert captions(folder) == {"a.mp4": "t"}
    assert captions(folder, caption_column="mine") == {"a.mp4": "m"}
    assert captions(folder, video_column="other", caption_column="prompt") == {"b.mp4": "p"}


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path):
    folder = write(tmp_path / "clips", {"x/a.mp4": b"v", "x/metadata.csv": "clip,words\na.mp4,a ball\n"})
    with pytest.raises(UserError) as error:
        find_clips(folder, video_column="clips")
    assert str(error.value) == (
        "x/metadata.csv has no column 'clips'. It has: clip, words. Name the right one with video_column."
    )
    with pytest.raises(UserError) as error:
        find_clips(folder, video_column="clip")
    assert str(error.value) == (
        "x/metadata.csv has no column of the usual names (text, caption, prompt, description). "
        "It has: clip, words. Name the right one with caption_column."
    )
    assert captions(folder, video_column="clip", caption_column="words") == {"x/a.mp4": "a ball"}
    folder = write(tmp_path / "plain", {"a.mp4": b"v", "a.txt": "a ball"})
    with pytest.raises(UserError) as error:
        find_clips(folder, caption_column="words")
    assert str(error.value) == (
        "plain has no metadata.jsonl or metadata.csv, so there is no column 'words'. "
        "Leave caption_column empty."
    )


def test_rows_that_cannot_be_used_are_left_out_by_their_line(tmp_path):
    lines = [
        jsonl({"file_name": "good.mp4", "text": " good "}),
        jsonl({"file_name": "gone.mp4", "text": "gone"}),
        jsonl({"file_name": "../outside.mp4", "text": "o"}),
        jsonl({"file_name": "/etc/passwd", "text": "o"}),
        "{broken\n", "[1]\n", "\n", "[" * 100_000 + "\n",
        jsonl({"text": "nameless"}),
        jsonl({"file_name": 7, "text": "seven"}),
        jsonl({"file_name": "mute.mp4"}),
        jsonl({"file_name": "list.mp4", "text": ["a", "b"]}),
        jsonl({"file_name": "good.mp4", "text": "again"}),
        jsonl({"file_name": "notes.txt", "text": "no video"}),
    ]  # fmt: skip
    videos = dict.fromkeys(["good.mp4", "mute.mp4", "list.mp4", "unnamed.mp4"], b"v")
    folder = write(
        tmp_path / "clips", {**videos, "notes.txt": "n", "unnamed.txt": "u", "metadata.jsonl": "".join(lines)}
    )
    (tmp_path / "outside.mp4").write_bytes(b"v")
    assert captions(folder) == {"good.mp4": "good"}
    found = reasons(folder)
    broken, nested = found.pop("metadata.jsonl, line 5"), found.pop("metadata.jsonl, line 8")
    assert broken.startswith("the line is not JSON (") and nested.startswith("the line is not JSON (")
    endings = ".avi, .flv, .gif, .m4v, .mkv, .mov, .mp4, .mpeg, .mpg, .webm, .wmv"
    assert found == {
        "metadata.jsonl, line 2": "gone.mp4: there is no such file in the data set",
        "metadata.jsonl, line 3": "../outside.mp4: it lies outside of the data set",
        "metadata.jsonl, line 4": "/etc/passwd: it lies outside of the data set",
        "metadata.jsonl, line 6": "the line is no JSON object in {}",
        "metadata.jsonl, line 9": "it names no video file",
        "metadata.jsonl, line 10": "it names no video file",
        "mute.mp4": "no caption: write what it shows into column 'text' of metadata.jsonl, line 11",
        "list.mp4": "no caption: write what it shows into column 'text' of metadata.jsonl, line 12",
        "metadata.jsonl, line 13": "good.mp4 is named before already",
        "notes.txt": f"it is no video that can be read here ({endings})",
        "unnamed.mp4": "it is not named in metadata.jsonl",
    }


def test_paths_in_a_table_count_from_its_folder_and_forgive_what_systems_change(tmp_path):
    folder = write(
        tmp_path / "clips",
        {
            "videos/A.MP4": b"v", "videos/b.mp4": b"v", "caf\u0065\u0301.mp4": b"v", "c.mp4": b"v",
            "labels/metadata.csv": (
                "file_name;text\n../videos/a.mp4;a, with a comma\n..\\videos\\b.mp4;b\n"
                f"../caf\u00e9.mp4;c\n{tmp_path}/clips/c.mp4;d\n"
            ),
        },
    )  # fmt: skip
    assert captions(folder) == {
        "videos/A.MP4": "a, with a comma", "videos/b.mp4": "b", "caf\u0065\u0301.mp4": "c", "c.mp4": "d",
    }  # fmt: skip


def test_captions_with_commas_and_line_breaks_need_quotes(tmp_path):
    table = 'file_name,text\na.mp4,"a ball, red\nand round"\nb.mp4,a ball, red\nc.mp4,"open\n'
    folder = write(tmp_path / "clips", {f"{name}.mp4": b"v" for name in "abc"} | {"metadata.csv": table})
    assert captions(folder) == {"a.mp4": "a ball, red\nand round"}
    assert reasons(folder) == {
        "b.mp4": "it is not named in metadata.csv",
        "c.mp4": "it is not named in metadata.csv",
        "metadata.csv, line 4": (
            'the row has 3 fields and the table 2 columns: put captions with commas in "quotes"'
        ),
        "metadata.csv, line 5": "the table cannot be read from here on (unexpected end of data)",
    }


def test_a_table_in_another_encoding_is_left_out_with_its_clips(tmp_path):
    table = "file_name,text\na.mp4,gr\u00fcn\n".encode("latin-1")
    folder = write(
        tmp_path / "clips", {"x/a.mp4": b"v", "x/metadata.csv": table, "b.mp4": b"v", "b.txt": "b"}
    )
    assert captions(folder) == {"b.mp4": "b"}
    assert reasons(folder) == {
        "x/a.mp4": "it is not named in x/metadata.csv",
        "x/metadata.csv": "it is not UTF-8 text: save it in that encoding",
    }


def test_every_folder_has_its_own_form_and_the_first_form_wins(tmp_path):
    folder = write(
        tmp_path / "clips",
        {
            "one/metadata.jsonl": jsonl({"file_name": "sub/a.mp4", "text": "by JSON"}),
            "one/metadata.csv": "file_name,text\nsub/a.mp4,by CSV\n",
            "one/prompts.txt": "by line\n", "one/videos.txt": "sub/a.mp4\n",
            "one/sub/a.mp4": b"v", "one/sub/a.txt": "by itself", "one/sub/b.mp4": b"v", "one/sub/b.txt": "b",
            "two/metadata.csv": "file_name,text\na.mp4,by CSV\n", "two/a.mp4": b"v", "two/a.txt": "by itself",
            "two/prompts.txt": "by line\n", "two/videos.txt": "a.mp4\n",
            "three/prompts.txt": "by line\n", "three/videos.txt": "a.mp4\n",
            "three/a.mp4": b"v", "three/a.txt": "by itself",
            "four/a.mp4": b"v", "four/a.txt": "by itself",
        },
    )  # fmt: skip
    assert captions(folder) == {
        "one/sub/a.mp4": "by JSON",
        "two/a.mp4": "by CSV",
        "three/a.mp4": "by line",
        "four/a.mp4": "by itself",
    }
    assert reasons(folder) == {"one/sub/b.mp4": "it is not named in one/metadata.jsonl"}


# Line by line


@pytest.mark.parametrize("name", ["prompts.txt", "prompt.txt", "PROMPTS.TXT"])
def test_lines_of_prompts_go_with_lines_of_videos(tmp_path, name):
    files = {"videos/1.mp4": b"v", "videos/2.mp4": b"v", "videos.txt": "videos/2.mp4\r\nvideos/1.mp4\r\n\r\n"}
    folder = write(tmp_path / "clips", {**files, name: "the second,\u2028still it\nthe first"})
    assert captions(folder) == {"videos/1.mp4": "the first", "videos/2.mp4": "the second,\u2028still it"}


def test_the_line_files_may_have_names_of_their_own(tmp_path):
    files = {"a.mp4": b"v", "paths.txt": "a.mp4\n", "words.txt": "a ball\n"}
    folder = write(tmp_path / "clips", files)
    named = {"video_column": "paths.txt", "caption_column": "words.txt"}
    assert captions(folder, **named) == {"a.mp4": "a ball"}


def test_different_line_counts_are_told(tmp_path):
    files = {"a.mp4": b"v", "b.mp4": b"v", "x/videos.txt": "../a.mp4\n../b.mp4\n", "x/prompts.txt": "one\n"}
    with pytest.raises(UserError) as error:
        find_clips(write(tmp_path / "clips", files))
    assert str(error.value) == (
        "x/videos.txt has 2 lines and x/prompts.txt has 1: each line of one names a video and the same line "
        "of the other is its caption, so both need as many."
    )


def test_a_blank_line_is_a_caption_that_is_missing(tmp_path):
    files = {"a.mp4": b"v", "b.mp4": b"v", "c.mp4": b"v", "videos.txt": "a.mp4\nb.mp4\nc.mp4\n"}
    folder = write(tmp_path / "clips", {**files, "prompts.txt": "\nb\n\n\n"})
    assert captions(folder) == {"b.mp4": "b"}
    assert reasons(folder) == {
        "a.mp4": "no caption: write what it shows into line 1 of prompts.txt",
        "c.mp4": "no caption: write what it shows into line 3 of prompts.txt",
    }


# Captions that are not needed


def uncaptioned(folder: Path, **columns: str) -> tuple[dict[str, str], dict[str, str]]:
    clips, left_out = find_clips(folder, need_captions=False, **columns)
    assert all(clip.path.is_file() and clip.path == folder / clip.name for clip in clips)
    return {clip.name: clip.caption for clip in clips}, {item.name: item.reason for item in left_out}


def test_where_none_is_needed_a_clip_without_a_caption_has_an_empty_one(tmp_path):
    folder = write(
        tmp_path / "clips",
        {
            "good.mp4": b"v", "good.txt": " good\n",
            "x/none.mp4": b"v",
            "x/y/empty.MOV": b"v", "x/y/empty.txt": " \n",
            "x/\u7403 caf\u0065\u0301.webm": b"v",
            "notes.txt": "n", ".hidden.mp4": b"v", "__MACOSX/._good.mp4": b"x",
        },
    )  # fmt: skip
    (folder / "link.mp4").symlink_to(folder / "good.mp4")
    (folder / "broken.mp4").symlink_to(folder / "gone.mp4")
    assert uncaptioned(folder) == (
        {
            "good.mp4": "good",
            "link.mp4": "",
            "x/none.mp4": "",
            "x/y/empty.MOV": "",
            "x/\u7403 caf\u0065\u0301.webm": "",
        },
        {},
    )


def test_where_none_is_needed_a_caption_that_cannot_be_read_still_leaves_its_clip_out(tmp_path):
    folder = write(
        tmp_path / "clips",
        {
            "a.mp4": b"v",
            "latin.mp4": b"v", "latin.txt": "gr\u00fcn".encode("latin-1"),
            "camera.MTS": b"v",
            "table/b.mp4": b"v", "table/metadata.csv": "file_name,text\nb.mp4,gr\u00fcn\n".encode("latin-1"),
            "lines/c.mp4": b"v", "lines/videos.txt": "c.mp4\n", "lines/prompts.txt": b"gr\xfcn\n",
        },
    )  # fmt: skip
    assert uncaptioned(folder) == (
        {"a.mp4": ""},
        {
            "camera.MTS": ".mts files cannot be read: convert it to mp4",
            "latin.mp4": "no caption: latin.txt is not UTF-8 text: save it in that encoding",
            "lines/c.mp4": "it is not named in lines/videos.txt",
            "lines/prompts.txt": "it is not UTF-8 text: save it in that encoding",
            "table/b.mp4": "it is not named in table/metadata.csv",
            "table/metadata.csv": "it is not UTF-8 text: save it in that encoding",
        },
    )


def test_where_none_is_needed_a_table_may_have_empty_captions_and_miss_clips(tmp_path):
    rows = [
        {"file_name": "good.mp4", "text": " good "}, {"file_name": "blank.mp4", "text": " "},
        {"file_name": "null.mp4", "text": None}, {"file_name": "b\u00e4ll.mp4"},
        {"file_name": "list.mp4", "text": ["a", "b"]}, {"file_name": "gone.mp4", "text": ""},
        {"file_name": "blank.mp4"},
    ]  # fmt: skip
    names = ["good.mp4", "blank.mp4", "null.mp4", "ba\u0308ll.mp4", "list.mp4", "below/unnamed.mp4"]
    files = {**dict.fromkeys(names, b"v"), "below/unnamed.txt": "u"}
    folder = write(tmp_path / "clips", {**files, "metadata.jsonl": jsonl(*rows) + "{broken\n"})
    found, left_out = uncaptioned(folder)
    assert found == {
        "ba\u0308ll.mp4": "",
        "below/unnamed.mp4": "",
        "blank.mp4": "",
        "good.mp4": "good",
        "null.mp4": "",
    }
    assert left_out.pop("metadata.jsonl, line 8").startswith("the line is not JSON (")
    assert left_out == {
        "list.mp4": "no caption: write what it shows into column 'text' of metadata.jsonl, line 5",
        "metadata.jsonl, line 6": "gone.mp4: there is no such file in the data set",
        "metadata.jsonl, line 7": "blank.mp4 is named before already",
    }


def test_where_none_is_needed_a_table_may_lack_the_column_unless_it_is_asked_for(tmp_path):
    files = {"a.mp4": b"v", "b.mp4": b"v", "metadata.csv": ",file_name\n0,a.mp4\n1,b.mp4\n"}
    folder = write(tmp_path / "clips", files)
    assert uncaptioned(folder) == ({"a.mp4": "", "b.mp4": ""}, {})
    with pytest.raises(UserError, match="no column 'words'"):
        find_clips(folder, caption_column="words", need_captions=False)
    with pytest.raises(UserError, match="no column of the usual names"):
        find_clips(folder)


def test_where_none_is_needed_a_blank_line_is_an_empty_caption(tmp_path):
    files = {f"{name}.mp4": b"v" for name in "abcd"} | {"videos.txt": "a.mp4\nb.mp4\nc.mp4\n"}
    folder = write(tmp_path / "clips", {**files, "prompts.txt": "\nb\n\n"})
    assert uncaptioned(folder) == ({"a.mp4": "", "b.mp4": "b", "c.mp4": "", "d.mp4": ""}, {})
    (folder / "prompts.txt").unlink()
    assert uncaptioned(folder) == (dict.fromkeys(["a.mp4", "b.mp4", "c.mp4", "d.mp4"], ""), {})


def test_where_no_caption_is_needed_an_error_asks_for_videos_alone(tmp_path):
    folder = write(tmp_path / "clips", {"camera.mts": b"v", "1.jpg": b"", "1.txt": "an image"})
    with pytest.raises(UserError) as error:
        find_clips(folder, need_captions=False)
    assert str(error.value) == (
        "clips holds no clips: it has 1 .jpg, 1 .txt, 1 .mts (camera.mts: .mts files cannot be read: convert "
        "it to mp4). Give videos (.mp4, .mov, .webm, .gif, ...), in folders or not."
    )


# Nothing at all


def test_a_data_set_without_clips_says_what_there_is_and_what_is_allowed(tmp_path):
    with pytest.raises(UserError) as error:
        find_clips(write(tmp_path / "none", {}))
    assert str(error.value) == f"none holds no clips: it is empty. {FORMS}"
    files = {"1.jpg": b"", "2.JPG": b"", "notes.txt": "n", "LICENSE": b""}
    with pytest.raises(UserError) as error:
        find_clips(write(tmp_path / "images", files))
    assert str(error.value) == (f"images holds no clips: it has 2 .jpg, 1 without an ending, 1 .txt. {FORMS}")
    with pytest.raises(UserError) as error:
        find_clips(write(tmp_path / "mute", {f"{n}.mp4": b"v" for n in range(7)}))
    said = "; ".join(f"{n}.mp4: no caption: write what it shows into {n}.txt" for n in range(5))
    assert str(error.value) == f"mute holds no clips: it has 7 .mp4 ({said}; and 2 more). {FORMS}"


def test_what_is_no_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="gone is not a folder"):
        find_clips(tmp_path / "gone")


def test_names_in_no_known_encoding_can_be_printed(tmp_path):
    folder = write(tmp_path / "clips", {"a.mp4": b"v", "a.txt": "a"})
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")).write_bytes(b"v")
    assert reasons(folder) == {"caf\\xe9.mp4": "no caption: write what it shows into caf\\xe9.txt"}


# Archives


def zip_of(path: Path, files: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return path


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = write(tmp_path / "clips", {"a.mp4": b"v"})
    assert open_data(folder, tmp_path / "work") == folder and not (tmp_path / "work").exists()


def test_a_zip_from_a_mac_becomes_samples(tmp_path):
    grey = np.arange(20, 236, 12, dtype=np.uint8)  # 18 frames, each lighter than the last
    frames = np.broadcast_to(grey[:, None, None, None], (18, 48, 64, 3))
    video = write_video(frames, tmp_path / "v.mp4", fps=16, format="mp4", metadata={}).read_bytes()
    files = {"My clips/Star.MP4": video, "My clips/Star.txt": b"a star", "__MACOSX/My clips/._Star.MP4": b"x"}
    archive = zip_of(tmp_path / "clips.zip", files)
    folder = open_data(archive, tmp_path / "work")
    assert folder.is_relative_to(tmp_path / "work") and folder.name == "clips.zip"
    (clip,), left_out = find_clips(folder)
    assert (clip.name, clip.caption, left_out) == ("My clips/Star.MP4", "a star", [])
    settings = Sampling(
        fps=8, frame_step=8, max_frames=49, width=64, height=48, fit="center", random_crops=1, flip=False,
        skip_frames_start=0, skip_frames_end=0, long_clips="split", seed=0,
    )  # fmt: skip
    (sample,) = clip_samples(clip.path, settings)
    assert sample.frames.mean((1, 2, 3)) == pytest.approx(grey[::2], abs=2)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_of_any_compression_and_name_is_unpacked(tmp_path, mode):
    folder = write(tmp_path / "clips", {"a.mp4": b"v", "a.txt": "a"})
    with tarfile.open(tmp_path / "input.bin", mode) as tar:
        tar.add(folder, "clips")
    assert captions(open_data(tmp_path / "input.bin", tmp_path / "work")) == {"clips/a.mp4": "a"}


def test_the_same_archive_is_unpacked_once_and_another_beside_it(tmp_path, monkeypatch):
    archive = zip_of(tmp_path / "clips.zip", {"a.mp4": b"v", "a.txt": b"a"})
    first = open_data(archive, tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(source, "extract_archive", lambda *args, **options: pytest.fail("unpacked again"))
        assert open_data(archive, tmp_path / "work") == first
    zip_of(archive, {"a.mp4": b"v", "a.txt": b"b"})
    second = open_data(archive, tmp_path / "work")
    assert (captions(first), captions(second)) == ({"a.mp4": "a"}, {"a.mp4": "b"})


def test_an_archive_without_clips_is_told_by_its_name(tmp_path):
    folder = open_data(zip_of(tmp_path / "clips.zip", {}), tmp_path / "work")
    with pytest.raises(UserError) as error:
        find_clips(folder)
    assert str(error.value) == f"clips.zip holds no clips: it is empty. {FORMS}"
    folder = open_data(zip_of(tmp_path / "clips.zip", {"x/a.jpg": b""}), tmp_path / "work")
    with pytest.raises(UserError) as error:
        find_clips(folder)
    assert str(error.value) == f"clips.zip holds no clips: it has 1 .jpg. {FORMS}"


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    zeros, archive = bytes(16 << 20), tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for index in range(65):
            bomb.writestr(f"{index}.mp4", zeros)
    assert archive.stat().st_size < 6_000_000
    with pytest.raises(UserError) as error:
        open_data(archive, tmp_path / "work")
    assert str(error.value) == "bomb.zip unpacks to more than the 1.1 GB that are allowed."
    assert not [path for path in (tmp_path / "work").rglob("*") if not path.is_dir()]


def test_the_callers_bound_holds_below_the_usual_one(tmp_path):
    archive = zip_of(tmp_path / "clips.zip", {"a.mp4": os.urandom(5000)})
    with pytest.raises(UserError, match=r"clips\.zip unpacks to more than the 4\.0 kB that are allowed"):
        open_data(archive, tmp_path / "work", max_bytes=4000)


def test_a_zip_that_would_leave_its_folder_is_refused(tmp_path):
    archive = zip_of(tmp_path / "evil.zip", {"a.mp4": b"v", "../../evil.mp4": b"v"})
    with pytest.raises(UserError) as error:
        open_data(archive, tmp_path / "work")
    assert str(error.value) == (
        "evil.zip: '../../evil.mp4' would leave the target folder; the archive is refused."
    )
    assert not list(tmp_path.rglob("*.mp4"))


def test_what_is_no_archive_is_told_what_is_allowed(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(os.urandom(5000))
    with pytest.raises(UserError) as error:
        open_data(tmp_path / "clip.mp4", tmp_path / "work")
    assert str(error.value) == (
        "clip.mp4 is neither a folder nor a zip or tar archive (.zip, .tar, .tar.gz, .tar.bz2, .tar.xz). "
        + FORMS
    )
    with pytest.raises(UserError, match="does not exist"):
        open_data(tmp_path / "gone.zip", tmp_path / "work")


# The Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(partial_file, "CHUNK_BYTES", 50_000)
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    with Host() as host:
        monkeypatch.setenv("HF_ENDPOINT", host.address)
        yield host


def serve(host: Host, files: dict[str, bytes], *, commit: str = COMMIT) -> dict[str, bytes]:
    host.files.update(hub_of("owner/clips", files, commit=commit, kind="datasets"))
    return files


CLIPS = {
    "README.md": b"# clips", "train/a.MP4": b"a" * 120_000, "train/a.txt": b"a ball", "code.py": b"evil",
    "metadata.jsonl": b'{"file_name": "train/a.MP4", "text": "a ball"}\n', ".gitattributes": b"x",
    "train/first.parquet": b"p",
}  # fmt: skip


@pytest.mark.parametrize("name", ["owner/clips", "owner/clips@main", f"owner/clips@{COMMIT}"])
def test_a_data_set_of_the_hub_comes_without_code_and_once(tmp_path, hub, monkeypatch, name):
    serve(hub, CLIPS)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    said: list[str] = []
    folder = fetch_hub_dataset(name, tmp_path, said.append)
    wanted = ["metadata.jsonl", "train/a.MP4", "train/a.txt"]
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == wanted
    assert all((folder / path).read_bytes() == CLIPS[path] for path in wanted)
    assert said == ["owner/clips: downloading 3 files, 120.1 kB"]
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, _, headers in hub.requests)
    assert captions(folder) == {"train/a.MP4": "a ball"}
    hub.requests.clear()
    assert fetch_hub_dataset(name, tmp_path, said.append) == folder
    assert [path.split("/")[1] for path, _, _ in hub.requests] == ["api"]


def test_a_download_that_broke_off_continues_and_a_moved_branch_is_another_folder(tmp_path, hub):
    serve(hub, CLIPS)
    broken = f"/datasets/owner/clips/resolve/{COMMIT}/train/a.txt"
    served = hub.files.pop(broken)
    with pytest.raises(UserError, match="HTTP 404"):
        fetch_hub_dataset("owner/clips", tmp_path, print)
    assert [path.name for path in tmp_path.iterdir()] == ["owner--clips@0123456789abcdef.partial"]
    hub.files[broken] = served
    hub.requests.clear()
    first = fetch_hub_dataset("owner/clips", tmp_path, print)
    assert {path for path, _, _ in hub.requests if "/resolve/" in path} == {broken}
    serve(hub, {**CLIPS, "train/a.txt": b"another"}, commit="f" * 40)
    second = fetch_hub_dataset("owner/clips", tmp_path, print)
    assert (first / "train/a.txt").read_bytes() == b"a ball"
    assert (second / "train/a.txt").read_bytes() == b"another"


def test_a_data_set_without_video_files_is_refused_before_anything_is_fetched(tmp_path, hub):
    serve(hub, {"data/0.parquet": b"p", "README.md": b"r", "notes.txt": b"n"})
    with pytest.raises(UserError) as error:
        fetch_hub_dataset("owner/clips", tmp_path, print)
    assert str(error.value) == (
        "owner/clips on the Hugging Face Hub has no video files: it keeps its data in .parquet files, which "
        f"are not read from the Hub. {FORMS}"
    )
    assert not any("/resolve/" in path for path, _, _ in hub.requests) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["../a.mp4", "/etc/a.mp4", "x/../../a.mp4"])
def test_a_hub_that_lists_files_outside_is_refused(tmp_path, hub, path):
    serve(hub, {"a.mp4": b"v", path: b"evil"})
    with pytest.raises(UserError, match="owner/clips lists a file outside itself; it is refused"):
        fetch_hub_dataset("owner/clips", tmp_path / "work", print)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("name", "meant"),
    [("clips", ""), ("owner/clips@", ""), ("../clips", ""), ("a/../b", ""),
     ("https://huggingface.co/datasets/owner/clips", " Perhaps owner/clips?")],
)  # fmt: skip
def test_names_that_are_none_are_told_the_form(tmp_path, name, meant):
    with pytest.raises(UserError) as error:
        fetch_hub_dataset(name, tmp_path, print)
    assert str(error.value) == (
        f"dataset_name={name!r} is no data set on the Hugging Face Hub: give owner/name, or "
        f"owner/name@revision.{meant}"
    )


@pytest.mark.parametrize(
    ("status", "code", "match"),
    [
        (401, "RepoNotFound", "The Hugging Face Hub has no data set owner/gone, or it is private"),
        (404, "RevisionNotFound", "owner/gone has no revision 'main'"),
        (403, "GatedRepo", "owner/gone is gated"),
    ],
)
def test_what_the_hub_refuses_is_told_in_plain_words(tmp_path, hub, status, code, match):
    answer = Served(b"", status=status, headers={"X-Error-Code": code})
    hub.files["/api/datasets/owner/gone/revision/main"] = answer
    with pytest.raises(UserError, match=match):
        fetch_hub_dataset("owner/gone", tmp_path, print)


# Captions


@pytest.mark.parametrize(
    ("caption", "trigger", "prefix", "suffix", "expected"),
    [
        ("a ball", "", "", "", "a ball"),
        ("a ball", "TOK", "", "", "TOK a ball"),
        ("a TOK ball", "TOK", "", "", "a TOK ball"),
        ("a tok, red", "TOK", "", "", "a tok, red"),
        ("a token ball", "TOK", "", "", "TOK a token ball"),
        ("a <star> ball", "<star>", "", "", "a <star> ball"),
        (
            "a ball",
            " TOK ",
            " In the style of X, ",
            " , high quality",
            "In the style of X, TOK a ball, high quality",
        ),
        ("a ball", "TOK", "", "it is slow", "TOK a ball it is slow"),
        ("a ball", "TOK", "TOK film:", "", "TOK film: a ball"),
        ("A ball.", "(a+", "", "", "(a+ A ball."),
    ],
)
def test_captions_are_put_together_with_one_blank_where_one_belongs(
    caption, trigger, prefix, suffix, expected
):
    affixes = {"trigger_word": trigger, "caption_prefix": prefix, "caption_suffix": suffix}
    assert full_caption(caption, **affixes) == expected


def test_the_listing_of_the_upper_folder_counts_where_two_name_a_clip(tmp_path):
    files = {
        "metadata.jsonl": jsonl({"file_name": "deep/a.mp4", "text": "upper"}),
        "deep/metadata.jsonl": jsonl(
            {"file_name": "a.mp4", "text": "lower"}, {"file_name": "b.mp4", "text": "only here"}
        ),
    }
    folder = write(tmp_path / "clips", {"deep/a.mp4": b"v", "deep/b.mp4": b"v", **files})
    assert captions(folder) == {"deep/a.mp4": "upper", "deep/b.mp4": "only here"}
    assert reasons(folder) == {}


def test_a_name_that_is_there_as_written_is_that_file(tmp_path):
    names = ["a\\b.mp4", " c.mp4", "e\u0301.mp4", "\u00e9.mp4"]
    files = {"metadata.jsonl": jsonl(*({"file_name": name, "text": repr(name)} for name in names))}
    folder = write(tmp_path / "clips", {**dict.fromkeys(names, b"v"), **files})
    assert captions(folder) == {name: repr(name) for name in names}
