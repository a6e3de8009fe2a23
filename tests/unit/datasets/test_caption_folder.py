"""Captions written into folders: existing text is kept, missing captions are added."""

import json
from pathlib import Path

from lib.datasets.caption_files import CaptionedDataset
from lib.datasets.caption_folder import complete_folder, write_folder
from lib.datasets.clips import LeftOut, find_clips
from tests.unit.datasets.test_caption_files import captioned, clips_in


def files(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / name.replace("__", "/").replace("_", ".")).write_text(text)


def completed(folder: Path, made: CaptionedDataset) -> list[str]:
    """Complete the folder and return the report."""
    lines: list[str] = []
    complete_folder(made, folder, report=lines.append)
    return lines


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def found(folder: Path) -> dict[str, str]:
    clips, left_out = find_clips(folder)
    assert left_out == []
    return {clip.name: clip.caption for clip in clips}


def test_all_caption_files_are_written_next_to_the_clips(tmp_path):
    captions = {"a.mp4": "a ball", "deep/b.mov": "a box"}
    assert completed(tmp_path, captioned(clips_in(tmp_path, captions), "a.mp4 deep/b.mov")) == []
    assert found(tmp_path) == captions
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {*captions, "a.txt", "deep/b.txt", "metadata.jsonl", "prompts.txt", "videos.txt"}


def test_an_existing_sidecar_is_kept_and_an_empty_one_is_filled(tmp_path):
    clips = clips_in(tmp_path, {"a.mp4": "mine", "b.mp4": "new"})
    files(tmp_path, a_txt="  mine\r\n", b_txt="\n")
    completed(tmp_path, captioned(clips, "b.mp4"))
    assert (tmp_path / "a.txt").read_bytes() == b"  mine\r\n"
    assert (tmp_path / "b.txt").read_text() == "new\n"


def test_a_sidecar_that_a_table_overrides_is_kept(tmp_path):
    clips = clips_in(tmp_path, {"a.mp4": "new"})
    files(tmp_path, a_txt="notes of mine", metadata_jsonl='{"file_name": "a.mp4", "text": ""}\n')
    completed(tmp_path, captioned(clips, "a.mp4"))
    assert (tmp_path / "a.txt").read_text() == "notes of mine"
    assert found(tmp_path) == {"a.mp4": "new"}


def test_a_replaced_caption_overwrites_the_file_it_was_read_from(tmp_path):
    clips = clips_in(tmp_path, {"a.mp4": "new", "b.mp4": "also new"})
    files(tmp_path, b_txt="old")
    (tmp_path / "a.mp4.txt").write_text("old")
    completed(tmp_path, captioned(clips, replaced="a.mp4 b.mp4"))
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "prompts.txt").unlink()
    assert found(tmp_path) == {"a.mp4": "new", "b.mp4": "also new"}


def test_a_table_keeps_its_columns_and_rows_and_missing_clips_are_appended(tmp_path):
    clips = clips_in(tmp_path, {"a.mp4": "mine", "b.mp4": "new b", "c.mp4": "new c"})
    mine = '{"video":"./a.mp4",  "caption":"mine", "source": "me"}'
    lines = [mine, '{"video": "b.mp4", "caption": "", "source": "you"}', "no JSON", '{"video": "gone.mp4"}']
    files(tmp_path, metadata_jsonl="\n".join(lines))
    completed(tmp_path, captioned(clips, "b.mp4 c.mp4"))
    assert (tmp_path / "metadata.jsonl").read_text().splitlines() == [
        mine,
        '{"video": "b.mp4", "caption": "new b", "source": "you"}',
        "no JSON",
        '{"video": "gone.mp4"}',
        '{"video": "c.mp4", "caption": "new c"}',
    ]
    assert {clip.name: clip.caption for clip in find_clips(tmp_path)[0]} == {
        "a.mp4": "mine", "b.mp4": "new b", "c.mp4": "new c"
    }  # fmt: skip


def test_a_csv_is_kept_and_its_rows_are_copied_to_metadata_jsonl_with_all_columns(tmp_path):
    clips = clips_in(tmp_path, {"a.mp4": "mine", "b.mp4": "new"})
    table = "path,text,mood\na.mp4,mine,glad\nb.mp4,,sad\n"
    files(tmp_path, metadata_csv=table)
    completed(tmp_path, captioned(clips, "b.mp4"))
    assert (tmp_path / "metadata.csv").read_text() == table
    assert rows(tmp_path) == [
        {"path": "a.mp4", "text": "mine", "mood": "glad"},
        {"path": "b.mp4", "text": "new", "mood": "sad"},
    ]
    assert found(tmp_path) == {"a.mp4": "mine", "b.mp4": "new"}


def test_lists_keep_their_lines_and_missing_clips_are_appended(tmp_path):
    clips = clips_in(tmp_path, {"a.mp4": "mine", "b.mp4": "new b", "c.mp4": "new c"})
    files(tmp_path, videos_txt="b.mp4\n./a.mp4\n", prompt_txt="\nmine")
    completed(tmp_path, captioned(clips, "b.mp4 c.mp4"))
    assert (tmp_path / "videos.txt").read_text() == "b.mp4\n./a.mp4\nc.mp4\n"
    assert (tmp_path / "prompt.txt").read_text() == "new b\nmine\nnew c\n"
    assert not (tmp_path / "prompts.txt").exists()


def test_a_list_of_something_else_is_kept_and_reported(tmp_path):
    files(tmp_path, prompts_txt="a prompt for something else\n")
    lines = completed(tmp_path, captioned(clips_in(tmp_path, {"a.mp4": "new"}), "a.mp4"))
    assert lines == [
        "prompts.txt does not list this folder's clips: videos.txt and prompts.txt are not written"
    ]
    assert (tmp_path / "prompts.txt").read_text() == "a prompt for something else\n"
    assert found(tmp_path) == {"a.mp4": "new"}


def test_the_table_of_a_subfolder_is_kept_and_overridden_by_the_new_one(tmp_path):
    clips = clips_in(tmp_path, {"a.mp4": "new", "deep/b.mp4": "mine", "deep/c.mp4": "new c"})
    table = '{"file_name": "b.mp4", "text": "mine"}\n{"file_name": "c.mp4", "text": ""}\n'
    files(tmp_path, deep__metadata_jsonl=table)
    completed(tmp_path, captioned(clips, "a.mp4 deep/c.mp4"))
    assert (tmp_path / "deep" / "metadata.jsonl").read_text() == table
    assert found(tmp_path) == {"a.mp4": "new", "deep/b.mp4": "mine", "deep/c.mp4": "new c"}


def test_completing_twice_changes_nothing(tmp_path):
    clips = clips_in(tmp_path, {"a.mp4": "one\ntwo", "a.mov": "three", "deep/b.mp4": "four"})
    completed(tmp_path, captioned(clips, "a.mp4 a.mov deep/b.mp4"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    completed(tmp_path, captioned(find_clips(tmp_path)[0]))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_errors_jsonl_is_removed_without_errors_unless_it_has_other_content(tmp_path):
    clips = clips_in(tmp_path, {"a.mp4": "new"})
    completed(tmp_path, captioned(clips, left_out=[LeftOut(name="b.mp4", reason="it is empty")]))
    assert (tmp_path / "errors.jsonl").read_text() == '{"file_name": "b.mp4", "error": "it is empty"}\n'
    completed(tmp_path, captioned(clips))
    assert not (tmp_path / "errors.jsonl").exists()
    files(tmp_path, errors_jsonl='{"mine": 1}\n')
    completed(tmp_path, captioned(clips))
    assert (tmp_path / "errors.jsonl").read_text() == '{"mine": 1}\n'


def test_a_separate_folder_gets_the_clips_as_hard_links(tmp_path):
    captions = {"a.mp4": "a ball", "deep/b.mov": "a box"}
    clips = clips_in(tmp_path / "in", captions)
    for _ in range(2):
        write_folder(captioned(clips, "a.mp4"), tmp_path / "out", videos=True)
        assert found(tmp_path / "out") == captions
        assert all((tmp_path / "out" / clip.name).samefile(clip.path) for clip in clips)
    assert {clip.name for clip in find_clips(tmp_path / "in", need_captions=False)[0]} == set(captions)
    assert len(list((tmp_path / "in").rglob("*"))) == 3


def test_a_separate_folder_without_clips_gets_only_the_caption_files(tmp_path):
    write_folder(captioned(clips_in(tmp_path / "in", {"a.mp4": "x"})), tmp_path / "out", videos=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.txt", "metadata.jsonl", "prompts.txt", "videos.txt"
    ]  # fmt: skip
