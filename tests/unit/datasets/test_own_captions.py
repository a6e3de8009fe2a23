"""Captions in files of the clips' own, and clips whose caption may be in a form that is not read."""

import json
import os
from pathlib import Path

import pytest

from tests.unit.datasets.test_clips import JPEG, MP4, captions, jsonl, reasons, uncaptioned, write

FOX, OWL = "a red fox runs through snow", "an owl sits on a branch"


@pytest.mark.parametrize(
    "files",
    [
        {"fox.mp4": b"v", "fox.mp4.txt": FOX},
        {"fox.mp4": b"v", "fox.caption": FOX},
        {"fox.mp4": b"v", "fox.json": json.dumps({"fps": 8, "Caption": f" {FOX} "})},
        {"fox.mp4": b"v", "fox.mp4.json": json.dumps({"prompt": FOX})},
        {"fox.mp4": b"v", "fox.json": json.dumps(FOX)},
        {"fox.mp4": b"v", "fox.txt": "", "fox.json": json.dumps({"text": FOX})},
        {"videos/fox.mp4": b"v", "labels/fox.txt": FOX},
        {"set/Videos/day/fox.mp4": b"v", "set/labels/day/fox.txt": FOX},
        {"clips/fox.mp4": b"v", "captions/fox.json": json.dumps({"description": FOX})},
        {"fox.mp4": b"v", "captions/fox.txt": FOX},
        {"day/fox.mp4": b"v", "prompts/day/fox.txt": FOX},
        {"day/fox.mp4": b"v", "day/prompt.txt": f"{FOX}\n", "owl/owl.mp4": b"v", "owl/caption.txt": OWL},
        {"clips/fox/fox.mp4": b"v", "captions/fox.txt": FOX},
        {"fox/fox.mp4": b"v", "fox.txt": FOX},
        {"z/fox.mp4": b"v", "z/text.txt": FOX},
        {"fox.mp4": b"v", "metadata.json": json.dumps({"caption": FOX})},
        {"sub/fox.mp4": b"v", "sub/videos.txt": "sub/fox.mp4\n", "sub/prompts.txt": f"{FOX}\n"},
        {"fox.mp4": b"v", "videos.txt": "fox.mp4\n", "captions.txt": f"{FOX}\n"},
        {"fox.mp4": b"v", "metadata.json": json.dumps([{"video": "fox.mp4", "caption": FOX}])},
        {"fox.mp4": b"v", "metadata.json": json.dumps({"fox.mp4": FOX})},
        {"fox.mp4": b"v", "metadata.json": json.dumps({"fox.mp4": {"text": FOX, "fps": 8}})},
        {"fox.mp4": b"v", "metadata.json": json.dumps({"v": 1, "data": [{"path": "fox.mp4", "text": FOX}]})},
        {"fox.mp4": b"v", "metadata.tsv": f"file\ttext\nfox.mp4\t{FOX}\n"},
        {"fox.mp4": b"v", "metadata.csv": f"file,text\nfox,{FOX}\n"},
        {"fox.mp4": b"v", "fox.txt": FOX, "metadata.json": json.dumps({"name": "foxes of the north"})},
    ],
    ids=lambda files: " ".join(files),
)
def test_captions_are_found_where_people_keep_them(tmp_path, files):
    folder = write(tmp_path / "clips", files)
    (fox,) = (name for name in files if name.endswith("fox.mp4"))
    assert captions(folder)[fox] == FOX
    kept, left_out = uncaptioned(folder)
    assert kept[fox] == FOX and left_out == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fox.yaml", f"caption: {FOX}"),
        ("fox.tags", "fox, snow, forest"),
        ("annotations/fox.txt", FOX),
        ("annotations/fox.txt", "red fox"),
        ("notes.txt", "fox.mp4: लाल लोमड़ी बर्फ में दौड़ती है"),
        ("notes.txt", "fox.mp4 สุนัขจิ้งจอกสีแดง"),
        ("table.csv", "fox,红色狐狸"),
        ("tables/train.parquet", b"PAR1"),
        ("tables/words.jsonl.gz", b"\x1f\x8b"),
        ("data/captions.pkl", b"\x80"),
        ("docs/fox.docx", b"PK"),
        ("captions.txt", f"{FOX}\n"),
        ("prompts.txt", f"{FOX}\n{OWL}\n"),
        ("captions.csv", f"clip,words\nfox.mp4,{FOX}\n"),
        ("sub/train.jsonl", jsonl({"key": "fox", "sentence": FOX})),
        ("dataset.json", json.dumps({"items": {"1": {"mov": "fox.mp4", "says": FOX}}})),
        ("table.csv", "fox.mp4;\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8\n"),
        ("metadata.parquet", b"PAR1"),
        ("list.txt", "fox.mp4 \u72d0\u72f8".encode("gbk")),
        ("metadata.json", '[{"video": "fox.mp4", "caption": "a red fox runs'),
    ],
)
def test_a_clip_whose_caption_may_be_in_another_form_is_named_and_not_captioned(tmp_path, name, text):
    folder = write(tmp_path / "clips", {"fox.mp4": b"v", "owl.mp4": b"v", "owl.txt": OWL, name: text})
    reason = f"no caption: {name} may hold it, but is not read: write it into fox.txt, or move that file away"
    assert uncaptioned(folder) == ({"owl.mp4": OWL}, {"fox.mp4": reason})
    assert reasons(folder) == {"fox.mp4": reason}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"caption": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (
            '{"label": "a red fox"}',
            "has no text under one of the usual names (text, caption, prompt, description)",
        ),
        ('{"caption": ["a red fox"]}', "has no text under one of the usual names"),
    ],
)
def test_a_json_file_of_a_clip_that_is_not_understood_is_named(tmp_path, text, fault):
    folder = write(tmp_path / "clips", {"fox.mp4": b"v", "owl.mp4": b"v", "fox.json": text})
    kept, left_out = uncaptioned(folder)
    assert kept == {"owl.mp4": ""} and left_out["fox.mp4"].startswith(f"no caption: fox.json {fault}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "fox.mp4 shows a red fox in the snow"),
        ("list.txt", "file 'fox.mp4'\nfile 'owl.mp4'\n"),
        ("scores.csv", "file_name,score\nfox.mp4,0.3\n"),
        ("videos.txt", "fox.mp4\n"),
        ("fox.srt", "1\n00:00:00 --> 00:00:02\nLook at that fox over there\n"),
        ("errors.jsonl", jsonl({"file_name": "fox.mp4", "error": "it could not be read"})),
        ("notes.txt", "we filmed these near the lake"),
        ("LICENSE.txt", "the fox owns this text (fox) and that one"),
        ("latents/0.pt", b"PK"),
        ("paper.pdf", b"%PDF"),
        ("old.tar.gz", b"\x1f\x8b"),
    ],
)
def test_other_texts_are_no_captions(tmp_path, name, text):
    folder = write(tmp_path / "clips", {"fox.mp4": b"v", name: text})
    assert uncaptioned(folder) == ({"fox.mp4": ""}, {})


def test_the_caption_of_one_clip_is_not_taken_for_another_of_its_name(tmp_path):
    folder = write(tmp_path / "clips", {"a/fox.mp4": b"v", "a/fox.txt": FOX, "b/fox.mp4": b"v"})
    assert uncaptioned(folder) == ({"a/fox.mp4": FOX, "b/fox.mp4": ""}, {})


def test_the_caption_of_a_clip_is_not_taken_for_the_folder_of_its_name(tmp_path):
    folder = write(tmp_path / "clips", {"fox.mp4": b"v", "fox.txt": FOX, "fox/owl.mp4": b"v"})
    assert uncaptioned(folder) == ({"fox.mp4": FOX, "fox/owl.mp4": ""}, {})


def test_a_clip_added_to_a_captioned_folder_has_no_caption_yet(tmp_path):
    files = {
        "fox.mp4": b"v", "fox.txt": FOX, "metadata.jsonl": jsonl({"file_name": "fox.mp4", "text": FOX}),
        "videos.txt": "fox.mp4\n", "prompts.txt": f"{FOX}\n", "owl.mp4": b"v",
    }  # fmt: skip
    assert uncaptioned(write(tmp_path / "clips", files)) == ({"fox.mp4": FOX, "owl.mp4": ""}, {})


def test_the_search_of_a_long_word_takes_linear_time(tmp_path):
    folder = write(tmp_path / "clips", {"fox.mp4": b"v", "notes.txt": "x" * (4 << 20)})
    assert uncaptioned(folder) == ({"fox.mp4": ""}, {})


# Which files are clips


def test_videos_are_known_by_their_content_where_their_ending_is_unusual(tmp_path):
    files = {
        "cam": MP4,
        "phone.3gp": MP4,
        "old.clip": MP4,
        "app.ts": b"export const fox = 1",
        "raw.h264": b"",
    }
    assert uncaptioned(write(tmp_path / "clips", files)) == (
        dict.fromkeys(["cam", "old.clip", "phone.3gp", "raw.h264"], ""),
        {},
    )


def test_pictures_and_unfinished_downloads_are_left_out_with_the_reason(tmp_path):
    files = {
        "fox.mp4": b"v", "fox.txt": FOX, "fox.jpg": JPEG, "fox.mp4.png": JPEG,  # posters
        "still.webp": b"", "picture": JPEG, "owl.mkv.part": b"\0", "cat.crdownload": MP4,
        "dog.xyz": b"?", "dog.txt": "a dog",
    }  # fmt: skip
    folder = write(tmp_path / "clips", files)
    assert captions(folder) == {"fox.mp4": FOX}
    assert reasons(folder) == {
        "cat.crdownload": ".crdownload is an unfinished download: finish it, or rename a complete one",
        "dog.xyz": "it is not a video file",
        "owl.mkv.part": ".part is an unfinished download: finish it, or rename a complete one",
        "picture": "it is a picture, not a video",
        "still.webp": "it is a picture, not a video",
    }


# Links


def test_linked_folders_are_followed_once(tmp_path):
    outside = write(
        tmp_path / "outside", {"fox.mp4": b"v", "fox.txt": FOX, "deep/owl.mp4": b"v", "deep/owl.txt": OWL}
    )
    folder = write(tmp_path / "clips", {"cat.mp4": b"v", "cat.txt": "a cat"})
    (folder / "a").symlink_to(outside)
    (folder / "b").symlink_to(outside)
    (outside / "deep" / "loop").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "gone")
    assert captions(folder) == {"a/deep/owl.mp4": OWL, "a/fox.mp4": FOX, "cat.mp4": "a cat"}
    already = "it is a link to a folder that is read already"
    assert reasons(folder) == {
        "a/deep/loop": already,
        "b": already,
        "gone": "it is a link to a file that does not exist",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="everything can be read by root")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    folder = write(tmp_path / "clips", {"cat.mp4": b"v", "cat.txt": "a cat", "shut/fox.mp4": b"v"})
    Path(folder / "shut").chmod(0)
    try:
        assert reasons(folder) == {"shut": "the folder cannot be read: Permission denied"}
    finally:
        Path(folder / "shut").chmod(0o700)
