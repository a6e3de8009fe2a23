"""Where script/caption may write."""

from pathlib import Path

import pytest

from lib.commands.caption_paths import resolve_paths
from lib.errors import UserError


@pytest.fixture
def clips(tmp_path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    (tmp_path / "in.zip").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metadata.jsonl").touch()
    return folder


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("in.zip", None, "in.zip is not a folder. An archive needs output_dir=PATH, where its captions go;"),
        ("none", None, "none does not exist. Give a folder, or a zip or tar of clips."),
        ("clips", "clips/out", "is inside the data set, whose clips would be found there again; give a"),
        ("clips", "used", "has a metadata.jsonl that is not from an earlier run"),
        ("clips", "in.zip", "in.zip is a file; give a folder."),
    ],
)
def test_unusable_paths_are_refused(clips, tmp_path, source, output, message):
    with pytest.raises(UserError) as refused:
        resolve_paths(tmp_path / source, output and tmp_path / output)
    assert message in str(refused.value)


def test_a_folder_is_captioned_in_place_unless_another_one_is_given(clips, tmp_path):
    assert resolve_paths(clips, None).in_place
    assert resolve_paths(clips, clips).in_place
    assert not resolve_paths(clips, tmp_path / "out").in_place


def test_the_folder_of_an_earlier_run_can_be_used_again(clips, tmp_path):
    (tmp_path / "used" / "captions.1.jsonl").touch()
    assert resolve_paths(clips, tmp_path / "used").output == tmp_path / "used"
