"""Names of a zip's members, whatever program and whatever Windows made it."""

import struct
import zipfile
import zlib
from pathlib import Path

import pytest

from lib.storage.archive import extract_archive
from lib.storage.zip_names import guess_encoding


def write_zip(path: Path, names: dict[bytes, bytes]) -> Path:
    """Write a zip with these names as they are, without the UTF-8 flag; the values are their extra fields."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, extra in names.items():
            # zipfile stores a name of code page 437 only if it is ASCII, so it gets the bytes themselves.
            entry = RawName(name.decode("cp437"))
            entry.filename = entry.orig_filename = name.decode("cp437")
            entry.extra = extra
            archive.writestr(entry, b"content of " + name)
    return path


class RawName(zipfile.ZipInfo):
    """An entry whose name is stored in code page 437, without the UTF-8 flag."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("cp437"), self.flag_bits & ~0x800


def unpacked(archive: Path) -> list[str]:
    folder = extract_archive(archive, archive.with_suffix(".folder"))
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Characters whose second byte is a backslash are among the most common ones: ソ 表 能 十 | 功 許 | 泒.
CASES = {
    "cp932": ["ソ表.mp4", "ソ表.txt", "予定表/十二月の能力.mp4", "赤い車が走る.mp4"],
    "gb18030": ["汽车在公路上行驶.mp4", "数据集/红色的圆形向右移动.mp4", "泒.mp4"],
    "cp949": ["빨간 원이 오른쪽으로.mp4", "영상/자동차.mp4"],
    "big5": ["紅色的圓形向右移動.mp4", "影片/成功許可蓋.mp4"],
    "cp437": ["café.mp4", "Müller/Größe.mp4", "señor à.mp4"],
    "utf-8": ["ソ表.mp4", "汽车/café.mp4"],
}


@pytest.mark.parametrize("encoding", CASES)
def test_names_come_out_as_they_were_written(tmp_path, encoding):
    names = CASES[encoding]
    archive = write_zip(tmp_path / "clips.zip", {name.encode(encoding): b"" for name in names})
    assert unpacked(archive) == sorted(names)


def test_a_backslash_of_windows_separates_folders_next_to_characters_that_contain_its_byte(tmp_path):
    stored = ["clips\\ソ表.mp4", "clips\\予定\\能.txt"]
    archive = write_zip(tmp_path / "clips.zip", {name.encode("cp932"): b"" for name in stored})
    assert unpacked(archive) == ["clips/ソ表.mp4", "clips/予定/能.txt"]


def unicode_path(stored: bytes, name: str, *, checksum: int | None = None) -> bytes:
    content = struct.pack("<BI", 1, zlib.crc32(stored) if checksum is None else checksum) + name.encode()
    return struct.pack("<HH", 0x7075, len(content)) + content


def test_the_unicode_path_field_names_a_member_if_it_belongs_to_the_stored_name(tmp_path):
    fields = {
        b"____.mp4": unicode_path(b"____.mp4", "ソ表.mp4"),
        b"kept.mp4": unicode_path(b"kept.mp4", "other.mp4", checksum=7),
        b"stays.mp4": struct.pack("<HHB", 0x7075, 1, 1),
    }
    archive = write_zip(tmp_path / "clips.zip", fields)
    assert unpacked(archive) == ["kept.mp4", "stays.mp4", "ソ表.mp4"]


def test_a_unicode_path_cannot_leave_the_target(tmp_path):
    archive = write_zip(tmp_path / "clips.zip", {b"a.mp4": unicode_path(b"a.mp4", "../../a.mp4")})
    with pytest.raises(ValueError, match=r"'\.\./\.\./a\.mp4' would leave the target folder"):
        extract_archive(archive, tmp_path / "folder")


def test_one_encoding_is_chosen_for_all_names_of_an_archive():
    # By itself the second name is as good in GB 18030.
    names = ["赤い車.mp4".encode("cp932"), "表.mp4".encode("cp932")]
    assert guess_encoding(names) == "cp932"
    assert guess_encoding([b"plain.mp4"]) == "utf-8"
    assert guess_encoding([b"\x81\x01.mp4"]) == "cp437", "no encoding has it"
