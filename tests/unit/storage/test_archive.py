import io
import os
import shutil
import stat
import struct
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.storage import archive
from lib.storage.archive import archive_kind, extract_archive, extract_tar
from lib.storage.disk import NoSpaceError


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
    """Unpack next to another file, expect the refusal, and check that only that file is left."""
    (tmp_path / "outside.txt").write_bytes(b"mine")
    path = make(tmp_path / "bad.tar", ("good.txt", b"good"), *members)
    with pytest.raises(UserError, match=match):
        extract_tar(path, tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tar", "outside.txt"]
    assert (tmp_path / "outside.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_unpacks_files_and_folders(tmp_path, mode):
    path = make(
        tmp_path / "a.tar",
        special("./", tarfile.DIRTYPE),
        special("empty", tarfile.DIRTYPE),
        ("./blobs/one", b"content"),
        mode=mode,
    )
    target = extract_tar(path, tmp_path / "deep" / "target")
    assert (target / "blobs/one").read_bytes() == b"content"
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
@pytest.mark.parametrize("goal", ["good.txt", "../outside.txt", "/etc/passwd", "nowhere", "link"])
def test_refuses_links_wherever_they_lead(tmp_path, kind, goal):
    refuse(tmp_path, special("link", kind, goal), match=r"^bad\.tar: 'link' is a link; only files")


def test_never_writes_through_a_link(tmp_path):
    members = (special("door", tarfile.SYMTYPE, ".."), ("door/outside.txt", b"evil"))
    refuse(tmp_path, *members, match="'door' is a link")


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
    refuse(tmp_path, ("b", b""), ("c", b""), match="more than 2 files and folders")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_that_was_cut_off_leaves_nothing(tmp_path, mode):
    path = make(tmp_path / "a.tar", ("file", os.urandom(100_000)), mode=mode)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"a\.tar is not a complete tar archive"):
        extract_tar(path, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_file_that_is_not_an_archive_is_refused(tmp_path):
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(UserError, match=r"page\.tar is not a complete tar archive"):
        extract_tar(tmp_path / "page.tar", tmp_path / "target")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*args: object) -> io.FileIO:
        return io.FileIO("/dev/full", "w")

    monkeypatch.setattr(archive, "_create", full)
    path = make(tmp_path / "a.tar", ("file", b"content"))
    with pytest.raises(NoSpaceError, match="The disk is full"):
        extract_tar(path, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


class SetAtCheck(threading.Event):
    """An event that is set from the `number`th check on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize(
    ("members", "checks"), [([b"x"] * 5, 4), ([bytes(5 << 20)], 4)], ids=["between members", "inside one"]
)
def test_a_stop_between_members_or_inside_a_large_one_leaves_nothing(tmp_path, kind, members, checks):
    entries = [(f"{index}.bin", content) for index, content in enumerate(members)]
    path = tmp_path / f"a.{kind}"
    zip_of(path, *entries) if kind == "zip" else make(path, *entries, mode="w:gz" if "gz" in kind else "w")
    with pytest.raises(Stopped):
        extract_archive(path, tmp_path / "target", stop=SetAtCheck(checks))
    assert list(tmp_path.iterdir()) == [path]
    assert extract_archive(path, tmp_path / "target", stop=threading.Event()).is_dir()


def test_does_not_unpack_over_an_existing_folder(tmp_path):
    path = make(tmp_path / "a.tar", ("file", b"new"))
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError, match="exists already"):
        extract_tar(path, tmp_path / "target")


def test_starts_from_scratch_after_a_killed_attempt(tmp_path):
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "file").write_bytes(b"half")
    target = extract_tar(make(tmp_path / "a.tar", ("file", b"whole")), tmp_path / "target")
    assert (target / "file").read_bytes() == b"whole"
    assert not (tmp_path / "target.partial").exists()


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_not_expanded_in_memory(tmp_path, mode):
    path = make(tmp_path / "bomb.tar", ("zeros", bytes(100_000_000)), mode=mode)
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    extract_tar(path, tmp_path / "target")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "target" / "zeros").stat().st_size == 100_000_000
    assert peak < 50_000_000


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_header_that_would_fill_the_memory_is_refused(tmp_path, kind):
    header = special("x", kind)
    header.size = 300 << 20
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(10240))
    with pytest.raises(UserError, match=r"'x' is not a file but claims 314,572,800 bytes"):
        extract_tar(tmp_path / "a.tar", tmp_path / "target")


# --- zip ------------------------------------------------------------------------------------------------


def zip_of(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def unix(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def refuse_zip(tmp_path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], match: str) -> None:
    (tmp_path / "outside.txt").write_bytes(b"mine")
    path = zip_of(tmp_path / "bad.zip", ("good.txt", b"good"), *members)
    with pytest.raises(UserError, match=match):
        extract_archive(path, tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.zip", "outside.txt"]
    assert (tmp_path / "outside.txt").read_bytes() == b"mine"


def patch_sizes(path: Path, *, size: int | None = None, crc: int | None = None) -> None:
    """Let the only member announce another size and checksum, in its own header and in the contents."""
    data = bytearray(path.read_bytes())
    contents = data.index(b"PK\x01\x02")
    for place, value in ((14, crc), (22, size)):
        if value is not None:
            struct.pack_into("<I", data, place, value)
            struct.pack_into("<I", data, contents + place + 2, value)
    path.write_bytes(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_unpacks_stored_and_deflated_zips(tmp_path, method):
    noise = os.urandom(50_000) + bytes(50_000)
    path = zip_of(tmp_path / "a.zip", ("empty/", b""), ("deep/er/file", noise), ("none", b""), method=method)
    target = extract_archive(path, tmp_path / "new" / "target")
    assert (target / "deep/er/file").read_bytes() == noise and (target / "none").read_bytes() == b""
    assert (target / "empty").is_dir()
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_zip_and_tar_are_recognized_by_content(tmp_path):
    inner = zip_of(tmp_path / "inner.zip", ("a", b"a"))
    # A tar that ends in a stored zip has a zip's end as well.
    tar = make(tmp_path / "tar.zip", ("inner.zip", inner.read_bytes()))
    zipped = zip_of(tmp_path / "zip.tar.gz", ("b", b"b"))
    (tmp_path / "page").write_bytes(b"<html>" * 200)
    assert [archive_kind(p) for p in (tar, zipped, tmp_path / "page")] == ["tar", "zip", None]
    assert (extract_archive(tar, tmp_path / "1") / "inner.zip").read_bytes() == inner.read_bytes()
    assert (extract_archive(zipped, tmp_path / "2") / "b").read_bytes() == b"b"


@pytest.mark.parametrize("content", [b"", b"PK", b"Rar!\x1a\x07\x00" * 200, b"\x1f\x8b\x08 not gzip" * 100])
def test_a_file_that_is_neither_zip_nor_tar_is_refused_with_what_is_allowed(tmp_path, content):
    (tmp_path / "clips.rar").write_bytes(content)
    with pytest.raises(UserError) as error:
        extract_archive(tmp_path / "clips.rar", tmp_path / "target")
    assert str(error.value) == (
        "clips.rar is neither a zip nor a tar archive. "
        "Pack the files as .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz."
    )


@pytest.mark.parametrize(
    "name", ["../outside.txt", "a/../../outside.txt", "..\\outside.txt", "C:\\x", "/etc/x"]
)
def test_refuses_zip_members_that_leave(tmp_path, name):
    refuse_zip(
        tmp_path, (name, b"evil"), match=r"^bad\.zip: '.+' would leave the target folder; the archive is"
    )


def test_zip_names_are_read_as_their_writers_meant_them(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("win\\a.mp4", b"1"), ("ä.mp4", b"2"), ("星.mp4", b"3"))
    data = bytearray(path.read_bytes())
    for start, flags, name in ((b"PK\x03\x04", 7, 30), (b"PK\x01\x02", 9, 46)):
        place = data.index("ä.mp4".encode()) if name == 30 else data.rindex("ä.mp4".encode())
        assert data[place - name : place - name + 4] == start
        data[place - name + flags] &= ~8  # UTF-8, but not flagged as such
    path.write_bytes(data)
    target = extract_archive(path, tmp_path / "target")
    found = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*.mp4")}
    assert found == {"win/a.mp4": b"1", "ä.mp4": b"2", "星.mp4": b"3"}


def test_refuses_encrypted_zips(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("clip.mp4", b"content"))
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        extract_archive(path, tmp_path / "target")
    assert str(error.value) == "a.zip: 'clip.mp4' is encrypted. Pack the files without a password."


@pytest.mark.parametrize(("method", "name"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA")])
def test_refuses_zip_members_compressed_with_anything_but_deflate(tmp_path, method, name):
    path = zip_of(tmp_path / "a.zip", ("clip.mp4", bytes(1000)), method=method)
    with pytest.raises(UserError) as error:
        extract_archive(path, tmp_path / "target")
    assert str(error.value) == (
        f"a.zip: 'clip.mp4' is compressed with {name}. Pack the files with deflate, the usual method of zip, "
        "or without compression."
    )
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("goal", [b"good.txt", b"../outside.txt", b"/etc/passwd", b"a\0b"])
def test_refuses_links_in_zips_wherever_they_lead(tmp_path, goal):
    refuse_zip(tmp_path, (unix("link", stat.S_IFLNK | 0o777), goal), match=r"^bad\.zip: 'link' is a link")


def test_refuses_devices_duplicates_and_clashes_in_zips(tmp_path):
    refuse_zip(tmp_path, (unix("null", stat.S_IFCHR | 0o666), b""), match="'null' is a device or pipe")
    with pytest.warns(UserWarning, match="Duplicate"):
        refuse_zip(tmp_path, ("good.txt", b"again"), match=r"'good\.txt' appears twice")
    refuse_zip(tmp_path, ("good.txt/below", b""), match="needs a folder where a file is")


def test_bounds_what_a_zip_announces_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "_write", lambda *args: pytest.fail("it was unpacked"))
    path = zip_of(tmp_path / "bomb.zip", *((str(index), bytes(1_000_000)) for index in range(5)))
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError) as error:
        extract_archive(path, tmp_path / "target", max_bytes=4_999_999)
    assert str(error.value) == "bomb.zip unpacks to more than the 5.0 MB that are allowed."
    assert [p.name for p in tmp_path.iterdir()] == ["bomb.zip"]


def test_a_zip_whose_header_lies_writes_no_more_than_it_announced(tmp_path):
    path = zip_of(tmp_path / "liar.zip", ("clip.mp4", bytes(100_000_000)))
    patch_sizes(path, size=1000, crc=zlib.crc32(bytes(1000)))
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        extract_archive(path, tmp_path / "target", max_bytes=2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(error.value) == (
        "liar.zip: 'clip.mp4' holds more than the 1,000 bytes it announces; it is refused."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["liar.zip"]
    assert peak < 80_000_000


def test_a_zip_member_that_is_short_or_damaged_is_refused(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("clip.mp4", b"content" * 100))
    patch_sizes(path, size=5000)
    with pytest.raises(UserError, match=r"a\.zip: 'clip\.mp4' ends early; the archive is incomplete"):
        extract_archive(path, tmp_path / "target")
    patch_sizes(path, size=700, crc=1)
    with pytest.raises(UserError, match=r"a\.zip: 'clip\.mp4' is damaged: its checksum is not the one"):
        extract_archive(path, tmp_path / "target")


def test_a_zip_that_was_cut_off_leaves_nothing(tmp_path):
    path = zip_of(tmp_path / "a.zip", ("file", os.urandom(100_000)))
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"a\.zip is not a complete zip archive"):
        extract_archive(path, tmp_path / "target")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_damaged_anywhere_unpack_correctly_or_are_refused(tmp_path, method):
    content = os.urandom(300) + bytes(700)
    whole = zip_of(tmp_path / "a.zip", ("clip.mp4", content), ("clip.txt", b"a clip"), method=method)
    data, path = whole.read_bytes(), tmp_path / "b.zip"
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            target = extract_archive(path, tmp_path / "target", max_bytes=10_000)
        except UserError:
            continue
        assert sum(p.stat().st_size for p in target.rglob("*") if p.is_file()) <= 10_000
        shutil.rmtree(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.zip"]


def test_tars_damaged_anywhere_unpack_correctly_or_are_refused(tmp_path):
    data = make(tmp_path / "a.tar", ("x" * 150, os.urandom(600)), ("clip.txt", b"a clip")).read_bytes()
    for place in range(0, 4096, 17):
        (tmp_path / "b.tar").write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            shutil.rmtree(extract_archive(tmp_path / "b.tar", tmp_path / "target", max_bytes=10_000))
        except UserError:
            continue


def test_bounds_the_number_of_zip_members_and_the_table_of_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_MEMBERS", 2)
    refuse_zip(tmp_path, ("b", b""), ("c", b""), match=r"bad\.zip holds more than 2 files and folders")
    monkeypatch.setattr(archive.zip_archive, "MAX_CONTENTS_BYTES", 100)
    refuse_zip(tmp_path, ("b", b""), match=r"its table of contents claims \d+ bytes")


def test_an_archive_that_the_disk_has_no_room_for_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    zipped = zip_of(tmp_path / "a.zip", ("a", bytes(1000)))
    tar = make(tmp_path / "a.tar", ("a", bytes(1000)))
    for path in (zipped, tar):
        with pytest.raises(NoSpaceError, match=r"1\.0 kB are needed and 999 bytes are free"):
            extract_archive(path, tmp_path / "target")
