"""Finding clips and captions in every supported layout, and the reasons for what is left out."""

import json
import os
from pathlib import Path

import pytest

from lib.datasets.clips import Clip, find_clips, full_caption
from lib.errors import UserError

FORMS = (
    "Give videos (.mp4, .mov, .webm, .gif, ...), in folders or not, each with its caption: in a .txt of "
    "the same name next to it, in metadata.jsonl, metadata.csv or metadata.json (columns file_name and "
    "text), or line by line in prompts.txt next to videos.txt."
)

MP4 = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF"


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


def test_a_video_has_the_caption_of_the_text_file_of_its_name_in_any_folder_and_case(tmp_path):
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


def test_hidden_files_and_those_of_operating_systems_are_ignored(tmp_path):
    junk = dict.fromkeys(
        ["__MACOSX/._a.mp4", "__MACOSX/b.mp4", "._a.mp4", ".DS_Store", "Thumbs.db", ".hidden/c.mp4"], b"x"
    )
    folder = write(tmp_path / "clips", {**junk, "a.mp4": b"v", "a.txt": "a", "README.md": b"hello"})
    assert find_clips(folder) == ([Clip(path=folder / "a.mp4", name="a.mp4", caption="a")], [])


def test_clips_without_a_caption_are_left_out_with_the_file_to_write(tmp_path):
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
    assert captions(folder) == {"camera.MTS": "a lake", "good.mp4": "good", "wide.mp4": "in UTF-16"}
    assert reasons(folder) == {
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


def test_a_missing_column_is_an_error_that_lists_the_existing_ones(tmp_path):
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
        "plain has none of metadata.jsonl, metadata.csv, metadata.tsv, metadata.json, so there is no column "
        "'words'. Leave caption_column empty."
    )


def test_unusable_rows_are_left_out_with_their_line(tmp_path):
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
    assert found == {
        "metadata.jsonl, line 2": "gone.mp4: there is no such file in the data set",
        "metadata.jsonl, line 3": "../outside.mp4: it lies outside of the data set",
        "metadata.jsonl, line 4": "/etc/passwd: it lies outside of the data set",
        "metadata.jsonl, line 6": "the line is not a JSON object",
        "metadata.jsonl, line 9": "it does not name a video file",
        "metadata.jsonl, line 10": "it does not name a video file",
        "mute.mp4": "no caption: write what it shows into column 'text' of metadata.jsonl, line 11",
        "list.mp4": "no caption: write what it shows into column 'text' of metadata.jsonl, line 12",
        "metadata.jsonl, line 13": "good.mp4 is listed more than once",
        "notes.txt": "it is not a video file",
        "unnamed.mp4": "it is not listed in metadata.jsonl",
    }


def test_paths_in_a_table_are_relative_to_it_and_may_differ_in_case_separator_and_normalization(tmp_path):
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
        "b.mp4": "it is not listed in metadata.csv",
        "c.mp4": "it is not listed in metadata.csv",
        "metadata.csv, line 4": (
            'the row has 3 fields and the table 2 columns: put captions with commas in "quotes"'
        ),
        "metadata.csv, line 5": "the table cannot be read from here on (unexpected end of data): "
        "is a quote left open?",
    }


def test_a_table_in_another_encoding_is_left_out_with_its_clips(tmp_path):
    table = "file_name,text\na.mp4,gr\u00fcn\n".encode("latin-1")
    folder = write(
        tmp_path / "clips", {"x/a.mp4": b"v", "x/metadata.csv": table, "b.mp4": b"v", "b.txt": "b"}
    )
    assert captions(folder) == {"b.mp4": "b"}
    assert reasons(folder) == {
        "x/a.mp4": "it is not listed in x/metadata.csv",
        "x/metadata.csv": "it is not UTF-8 text: save it in that encoding",
    }


def test_the_first_kind_of_listing_in_a_folder_takes_precedence(tmp_path):
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
    assert reasons(folder) == {"one/sub/b.mp4": "it is not listed in one/metadata.jsonl"}


# Line by line


@pytest.mark.parametrize("name", ["prompts.txt", "prompt.txt", "PROMPTS.TXT"])
def test_lines_of_prompts_go_with_lines_of_videos(tmp_path, name):
    files = {"videos/1.mp4": b"v", "videos/2.mp4": b"v", "videos.txt": "videos/2.mp4\r\nvideos/1.mp4\r\n\r\n"}
    folder = write(tmp_path / "clips", {**files, name: "the second,\u2028still it\nthe first"})
    assert captions(folder) == {"videos/1.mp4": "the first", "videos/2.mp4": "the second,\u2028still it"}


def test_the_line_by_line_files_can_be_named(tmp_path):
    files = {"a.mp4": b"v", "paths.txt": "a.mp4\n", "words.txt": "a ball\n"}
    folder = write(tmp_path / "clips", files)
    named = {"video_column": "paths.txt", "caption_column": "words.txt"}
    assert captions(folder, **named) == {"a.mp4": "a ball"}


def test_different_line_counts_are_an_error(tmp_path):
    files = {"a.mp4": b"v", "b.mp4": b"v", "x/videos.txt": "../a.mp4\n../b.mp4\n", "x/prompts.txt": "one\n"}
    with pytest.raises(UserError) as error:
        find_clips(write(tmp_path / "clips", files))
    assert str(error.value) == (
        "x/videos.txt has 2 lines and x/prompts.txt has 1: line N of x/prompts.txt is the caption of the "
        "video in line N of x/videos.txt, so both need the same number of lines."
    )


def test_a_blank_line_is_a_missing_caption(tmp_path):
    files = {"a.mp4": b"v", "b.mp4": b"v", "c.mp4": b"v", "videos.txt": "a.mp4\nb.mp4\nc.mp4\n"}
    folder = write(tmp_path / "clips", {**files, "prompts.txt": "\nb\n\n\n"})
    assert captions(folder) == {"b.mp4": "b"}
    assert reasons(folder) == {
        "a.mp4": "no caption: write what it shows into line 1 of prompts.txt",
        "c.mp4": "no caption: write what it shows into line 3 of prompts.txt",
    }


# Without need_captions


def uncaptioned(folder: Path, **columns: str) -> tuple[dict[str, str], dict[str, str]]:
    clips, left_out = find_clips(folder, need_captions=False, **columns)
    assert all(clip.path.is_file() and clip.path == folder / clip.name for clip in clips)
    return {clip.name: clip.caption for clip in clips}, {item.name: item.reason for item in left_out}


def test_without_need_captions_a_clip_may_have_an_empty_caption(tmp_path):
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
        {"broken.mp4": "it is a link to a file that does not exist"},
    )


def test_without_need_captions_an_unreadable_caption_still_leaves_its_clip_out(tmp_path):
    folder = write(
        tmp_path / "clips",
        {
            "a.mp4": b"v",
            "latin.mp4": b"v", "latin.txt": "gr\u00fcn".encode("latin-1"),
            "table/b.mp4": b"v", "table/metadata.csv": "file_name,text\nb.mp4,gr\u00fcn\n".encode("latin-1"),
            "lines/c.mp4": b"v", "lines/videos.txt": "c.mp4\n", "lines/prompts.txt": b"gr\xfcn\n",
        },
    )  # fmt: skip
    assert uncaptioned(folder) == (
        {"a.mp4": ""},
        {
            "latin.mp4": "no caption: latin.txt is not UTF-8 text: save it in that encoding",
            "lines/c.mp4": "it is not listed in lines/videos.txt",
            "lines/prompts.txt": "it is not UTF-8 text: save it in that encoding",
            "table/b.mp4": "it is not listed in table/metadata.csv",
            "table/metadata.csv": "it is not UTF-8 text: save it in that encoding",
        },
    )


def test_without_need_captions_a_table_may_have_empty_captions_and_miss_clips(tmp_path):
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
        "below/unnamed.mp4": "u",
        "blank.mp4": "",
        "good.mp4": "good",
        "null.mp4": "",
    }
    assert left_out.pop("metadata.jsonl, line 8").startswith("the line is not JSON (")
    assert left_out == {
        "list.mp4": "no caption: write what it shows into column 'text' of metadata.jsonl, line 5",
        "metadata.jsonl, line 6": "gone.mp4: there is no such file in the data set",
        "metadata.jsonl, line 7": "blank.mp4 is listed more than once",
    }


def test_without_need_captions_a_table_needs_a_caption_column_only_if_it_is_named(tmp_path):
    files = {"a.mp4": b"v", "b.mp4": b"v", "metadata.csv": ",file_name\n0,a.mp4\n1,b.mp4\n"}
    folder = write(tmp_path / "clips", files)
    assert uncaptioned(folder) == ({"a.mp4": "", "b.mp4": ""}, {})
    with pytest.raises(UserError, match="no column 'words'"):
        find_clips(folder, caption_column="words", need_captions=False)
    with pytest.raises(UserError, match="no column of the usual names"):
        find_clips(folder)


def test_without_need_captions_a_blank_line_is_an_empty_caption(tmp_path):
    files = {f"{name}.mp4": b"v" for name in "abcd"} | {"videos.txt": "a.mp4\nb.mp4\nc.mp4\n"}
    folder = write(tmp_path / "clips", {**files, "prompts.txt": "\nb\n\n"})
    assert uncaptioned(folder) == ({"a.mp4": "", "b.mp4": "b", "c.mp4": "", "d.mp4": ""}, {})
    (folder / "prompts.txt").unlink()
    assert uncaptioned(folder) == (dict.fromkeys(["a.mp4", "b.mp4", "c.mp4", "d.mp4"], ""), {})


def test_without_need_captions_the_error_asks_for_videos_alone(tmp_path):
    folder = write(tmp_path / "clips", {"clip.mp4.part": MP4, "1.jpg": JPEG, "1.txt": "an image"})
    with pytest.raises(UserError) as error:
        find_clips(folder, need_captions=False)
    assert str(error.value) == (
        "clips holds no clips: it has 1 .jpg, 1 .txt, 1 .part (1.jpg: it is a picture, not a video; "
        "clip.mp4.part: .part is an unfinished download: finish it, or rename a complete one). "
        "Give videos (.mp4, .mov, .webm, .gif, ...), in folders or not."
    )


# Nothing at all


def test_the_error_for_no_clips_lists_what_there_is_and_what_is_supported(tmp_path):
    with pytest.raises(UserError) as error:
        find_clips(write(tmp_path / "none", {}))
    assert str(error.value) == f"none holds no clips: it is empty. {FORMS}"
    files = {"1.jpg": b"", "2.JPG": b"", "notes.txt": "n", "LICENSE": b""}
    with pytest.raises(UserError) as error:
        find_clips(write(tmp_path / "images", files))
    assert str(error.value) == (
        "images holds no clips: it has 2 .jpg, 1 without an extension, 1 .txt (1.jpg: it is a picture, not a "
        f"video; 2.JPG: it is a picture, not a video). {FORMS}"
    )
    with pytest.raises(UserError) as error:
        find_clips(write(tmp_path / "mute", {f"{n}.mp4": b"v" for n in range(7)}))
    reasons = "; ".join(f"{n}.mp4: no caption: write what it shows into {n}.txt" for n in range(5))
    assert str(error.value) == f"mute holds no clips: it has 7 .mp4 ({reasons}; and 2 more). {FORMS}"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="gone is not a folder"):
        find_clips(tmp_path / "gone")


def test_names_in_an_unknown_encoding_can_be_printed(tmp_path):
    folder = write(tmp_path / "clips", {"a.mp4": b"v", "a.txt": "a"})
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")).write_bytes(b"v")
    assert reasons(folder) == {"caf\\xe9.mp4": "no caption: write what it shows into caf\\xe9.txt"}


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
def test_the_parts_of_a_caption_are_joined_with_single_spaces(caption, trigger, prefix, suffix, expected):
    affixes = {"trigger_word": trigger, "caption_prefix": prefix, "caption_suffix": suffix}
    assert full_caption(caption, **affixes) == expected


def test_the_listing_of_an_upper_folder_takes_precedence(tmp_path):
    files = {
        "metadata.jsonl": jsonl({"file_name": "deep/a.mp4", "text": "upper"}),
        "deep/metadata.jsonl": jsonl(
            {"file_name": "a.mp4", "text": "lower"}, {"file_name": "b.mp4", "text": "only here"}
        ),
    }
    folder = write(tmp_path / "clips", {"deep/a.mp4": b"v", "deep/b.mp4": b"v", **files})
    assert captions(folder) == {"deep/a.mp4": "upper", "deep/b.mp4": "only here"}
    assert reasons(folder) == {}


def test_a_name_that_exists_exactly_as_written_is_that_file(tmp_path):
    names = ["a\\b.mp4", " c.mp4", "e\u0301.mp4", "\u00e9.mp4"]
    files = {"metadata.jsonl": jsonl(*({"file_name": name, "text": repr(name)} for name in names))}
    folder = write(tmp_path / "clips", {**dict.fromkeys(names, b"v"), **files})
    assert captions(folder) == {name: repr(name) for name in names}
