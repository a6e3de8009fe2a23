import errno
import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from lib import archive
from lib.archive import NoSpaceError, extract_tar
from lib.errors import UserError


def make(path: Path, *members: tarfile.TarInfo | tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                info.mode = 0o7777
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def refuse(tmp_path: Path, *members: tarfile.TarInfo | tuple[str, bytes], match: str) -> None:
    """Unpack beside somebody's file, expect the refusal, and see that only that file is there afterwards."""
    (tmp_path / "outside.txt").write_bytes(b"mine")
    path = make(tmp_path / "bad.tar", ("good.txt", b"good"), *members)
    with pytest.raises(UserError, match=match):
        extract_tar(path, tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tar", "outside.txt"]
    assert (tmp_path / "outside.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_unpacks_files_folders_and_inner_links(tmp_path, mode):
    path = make(
        tmp_path / "a.tar",
        special("./", tarfile.DIRTYPE),
        special("empty", tarfile.DIRTYPE),
        ("./blobs/one", b"content"),
        special("snapshots/x/model.bin", tarfile.SYMTYPE, "../../blobs/one"),
        special("hard.bin", tarfile.LNKTYPE, "blobs/one"),
        mode=mode,
    )
    target = extract_tar(path, tmp_path / "deep" / "target")
    assert (target / "snapshots/x/model.bin").read_bytes() == b"content"
    assert (target / "hard.bin").read_bytes() == b"content"
    assert (target / "empty").is_dir()
    assert (target / "blobs/one").stat().st_mode & 0o7111 == 0, "modes of the archive are dropped"
    assert [p.name for p in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt", "a/.."])
def test_refuses_members_with_dots(tmp_path, name):
    refuse(tmp_path, (name, b"evil"), match="would leave the target folder")


def test_refuses_absolute_members(tmp_path):
    refuse(tmp_path, (str(tmp_path / "outside.txt"), b"evil"), match="would leave the target folder")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_refuses_devices_and_pipes(tmp_path, kind):
    refuse(tmp_path, special("null", kind), match="'null' is a device or pipe")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("goal", ["../outside.txt", "a/../../outside.txt", "/etc/passwd"])
def test_refuses_links_to_the_outside(tmp_path, kind, goal):
    refuse(tmp_path, ("a/file", b""), special("link", kind, goal), match="leaves? the target|absolute")


def test_refuses_a_chain_of_links_whose_every_name_looks_harmless(tmp_path):
    members = (
        ("a/b/c/file", b""),
        special("short", tarfile.SYMTYPE, "a/b/c"),
        special("up", tarfile.SYMTYPE, "short/../../../.."),
        special("out", tarfile.SYMTYPE, "up/outside.txt"),
    )
    refuse(tmp_path, *members, match="leaves the target folder")


def test_never_writes_through_a_link(tmp_path):
    members = (special("door", tarfile.SYMTYPE, ".."), ("door/outside.txt", b"evil"))
    refuse(tmp_path, *members, match="'door' appears twice")


def test_refuses_a_hard_link_through_a_link(tmp_path):
    members = (special("door", tarfile.SYMTYPE, ".."), special("copy", tarfile.LNKTYPE, "door/outside.txt"))
    refuse(tmp_path, *members, match="links through another link")


def test_refuses_a_link_that_lies_behind_a_link(tmp_path):
    members = (special("door", tarfile.SYMTYPE, ".."), special("door/new", tarfile.SYMTYPE, "outside.txt"))
    refuse(tmp_path, *members, match="lies behind a link")


@pytest.mark.parametrize("goal", ["nowhere", "loop"])
def test_refuses_links_that_lead_nowhere(tmp_path, goal):
    refuse(tmp_path, special("loop", tarfile.SYMTYPE, goal), match="leads nowhere")


def test_refuses_a_file_that_appears_twice(tmp_path):
    refuse(tmp_path, ("good.txt", b"again"), match=r"'good\.txt' appears twice")


def test_refuses_a_file_where_a_folder_is_needed(tmp_path):
    refuse(tmp_path, ("good.txt/below", b""), match="needs a folder where a file is")


def test_bounds_the_unpacked_size(tmp_path):
    path = make(tmp_path / "bomb.tar", ("zeros", bytes(1_000_000)), mode="w:gz")
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"more than the 900\.0 kB"):
        extract_tar(path, tmp_path / "target", max_bytes=900_000)
    assert not (tmp_path / "target").exists()
    assert extract_tar(path, tmp_path / "target", max_bytes=1_000_000).is_dir()


def test_bounds_the_number_of_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
    refuse(tmp_path, ("b", b""), ("c", b""), match="more than 2 members")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_that_was_cut_off_leaves_nothing(tmp_path, mode):
    path = make(tmp_path / "a.tar", ("file", os.urandom(100_000)), mode=mode)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"a\.tar is not a whole tar archive"):
        extract_tar(path, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_something_else_than_an_archive_is_told(tmp_path):
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(UserError, match=r"page\.tar is not a whole tar archive"):
        extract_tar(tmp_path / "page.tar", tmp_path / "target")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    path = make(tmp_path / "a.tar", ("file", b"content"))
    with pytest.raises(NoSpaceError, match="The disk is full"):
        extract_tar(path, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_does_not_unpack_over_something(tmp_path):
    path = make(tmp_path / "a.tar", ("file", b"new"))
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError, match="exists already"):
        extract_tar(path, tmp_path / "target")


def test_begins_anew_after_an_attempt_that_was_killed(tmp_path):
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "file").write_bytes(b"half")
    target = extract_tar(make(tmp_path / "a.tar", ("file", b"whole")), tmp_path / "target")
    assert (target / "file").read_bytes() == b"whole"
    assert not (tmp_path / "target.partial").exists()
