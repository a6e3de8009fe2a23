"""The names of a zip's members: UTF-8 where the zip says so, otherwise in the encoding of whoever made it.

A zip without the UTF-8 flag holds names in the code page of the Windows on which it was made, and does not
say which. In the East Asian ones the second byte of a character may be that of a backslash or a slash.
"""

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable

UTF_8_NAME = 0x800
UNICODE_PATH = 0x7075
"""Id of Info-ZIP's extra field with the name in UTF-8 (APPNOTE.TXT 4.6.9)."""
WESTERN = re.compile(
    rb"[\x00-\x7f]*(?:(?<![\x80-\xff\\/])[\x80-\x9a\xa0-\xa5\xe1](?=[A-Za-z .]|$)[\x00-\x7f]*)+"
)
"""A name with single letters of code page 437 that are not ASCII, such as accented ones."""


def _level(first: int, second: int, common: tuple[int, int]) -> float:
    return 1.0 if common[0] <= first <= common[1] and second >= 0xA1 else 0.0


def _japanese(first: int, second: int) -> float:
    return 1.0 if first in (0x81, 0x82, 0x83) or 0x88 <= first <= 0x97 else 0.3


EAST_ASIAN: dict[str, Callable[[int, int], float]] = {
    "cp932": _japanese,
    "cp949": lambda first, second: _level(first, second, (0xB0, 0xC8)),
    "gb18030": lambda first, second: 0.95 * _level(first, second, (0xB0, 0xD7)),
    "big5": lambda first, second: 0.9 if 0xA4 <= first <= 0xC6 else 0.2,
}
"""Encoding -> how common the character of two bytes is in its language, from 0 to 1.

The ranges are those of the kana and first-level kanji of JIS X 0208, the syllables of KS X 1001, and the
first levels of GB 2312 and Big5.
"""


def member_names(entries: Iterable[zipfile.ZipInfo]) -> list[str]:
    """Return the name of each member, with slashes between folders."""
    entries = list(entries)
    stored = [entry.orig_filename.encode("cp437") for entry in entries if not entry.flag_bits & UTF_8_NAME]
    encoding = guess_encoding(stored)
    # Some Windows programs write backslashes. They are told from parts of characters after decoding.
    return [_name(entry, encoding).replace("\\", "/") for entry in entries]


def guess_encoding(names: Iterable[bytes]) -> str:
    """Return the encoding of all these names together: UTF-8, an East Asian one, or code page 437."""
    names = [name for name in names if not name.isascii()]
    if _decodes(names, "utf-8"):  # macOS writes it without the flag
        return "utf-8"
    if all(WESTERN.fullmatch(name) for name in names):
        return "cp437"
    possible = [encoding for encoding in EAST_ASIAN if _decodes(names, encoding)]
    return max(possible, key=lambda encoding: _commonness(names, encoding), default="cp437")


def _name(entry: zipfile.ZipInfo, encoding: str) -> str:
    if entry.flag_bits & UTF_8_NAME:
        return entry.orig_filename
    stored = entry.orig_filename.encode("cp437")
    return _unicode_path(entry.extra, stored) or stored.decode(encoding)


def _unicode_path(extra: bytes, stored: bytes) -> str | None:
    """Return the name in the Unicode Path field, None if there is none that belongs to the stored name."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        content = extra[place + 4 : place + 4 + length]
        if kind == UNICODE_PATH and len(content) == length > 5 and content[0] == 1:
            checksum = int.from_bytes(content[1:5], "little")
            if checksum == zlib.crc32(stored) and _decodes([content[5:]], "utf-8"):
                return content[5:].decode("utf-8")
        place += 4 + length
    return None


def _decodes(names: list[bytes], encoding: str) -> bool:
    try:
        for name in names:
            name.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _commonness(names: list[bytes], encoding: str) -> float:
    """Return how common the characters of the names are in the language of an encoding, on average."""
    characters = {char for name in names for char in name.decode(encoding) if not char.isascii()}
    encoded = [char.encode(encoding, "replace") for char in characters]
    scores = [EAST_ASIAN[encoding](each[0], each[1]) if len(each) == 2 else 0.0 for each in encoded]
    return sum(scores) / len(scores)
