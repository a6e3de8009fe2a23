import os
import tarfile
import threading
from pathlib import Path

import pytest

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.storage.archive import extract_tar
from lib.storage.packing import pack


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "weights.bin").write_bytes(bytes(range(256)) * 100)
    (folder / "README.md").write_text("read me")
    (folder / "same.md").hardlink_to(folder / "README.md")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("consume", [False, True])
def test_a_tar_has_the_content_at_its_root_and_no_user_of_this_machine(folder, tmp_path, consume):
    before = contents(folder)
    tar = pack(folder, tmp_path / "out.tar", consume=consume)
    assert tar == tmp_path / "out.tar"
    assert contents(extract_tar(tar, tmp_path / "again")) == before
    with tarfile.open(tar, "r:") as archive:
        assert {(member.uid, member.uname) for member in archive.getmembers()} == {(0, "")}
        assert {oct(member.mode) for member in archive.getmembers() if member.isfile()} == {"0o644"}
    assert contents(folder) == ({} if consume else before)
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_content_gives_the_same_tar_at_any_time(folder, tmp_path):
    first = pack(folder, tmp_path / "first.tar").read_bytes()
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert pack(folder, tmp_path / "second.tar").read_bytes() == first


def test_a_tar_that_cannot_be_written_or_is_stopped_leaves_nothing(folder, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        pack(folder, tmp_path / "out.tar", stop=stop)
    with pytest.raises(UserError, match=r"out\.tar could not be written"):
        pack(folder, tmp_path / "missing" / "out.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
