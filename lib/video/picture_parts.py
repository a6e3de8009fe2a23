"""Reduce PNG and JPEG files to the parts that are needed to show them: nothing else can refuse a picture."""

import re
import struct
import zlib
from collections.abc import Iterator

PNG_START = b"\x89PNG\r\n\x1a\n"
JPEG_START = b"\xff\xd8"
MAX_PROFILE_BYTES = 1 << 20
MAX_EXIF_BYTES = 8 << 20
EXIF_TEXT = b"Raw profile type exif"
"""Keyword of ImageMagick's EXIF in a PNG: hexadecimal digits after the name, the length and line ends."""
TRANSPARENCY_BYTES = {0: (2,), 2: (6,), 3: range(1, 257)}
"""Colour type of a PNG -> lengths that its tRNS chunk can have."""

SOS, EOI = 0xDA, 0xD9
KEPT_SEGMENTS = {
    0xE0: (b"JFIF\0", b"JFXX\0"),
    0xE1: (b"Exif\0",),
    0xE2: (b"ICC_PROFILE\0",),
    0xEE: (b"Adobe",),
}
"""Markers of a JPEG's APPn segments -> how the contents that are needed begin."""
METADATA = {*range(0xE0, 0xF0), 0xFE}
"""Markers of segments that do not belong to the picture itself: APPn and comments."""
AFTER_SCAN = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""A marker that ends the data of a scan: neither an escaped 0xFF nor a restart marker."""
MARKER = re.compile(rb"\xff+([^\x00\xff])")


def needed_parts(data: bytes) -> bytes:
    """Return a PNG or JPEG without the parts that are not needed, and any other file as it is."""
    if data.startswith(PNG_START):
        return _needed_png(data)
    if data.startswith(JPEG_START):
        return b"".join(part for _, part in jpeg_parts(data))
    return data


def count_scans(data: bytes) -> int:
    """Return the number of scans in a JPEG; 0 for another file."""
    if not data.startswith(JPEG_START):
        return 0
    return sum(marker == SOS for marker, _ in jpeg_parts(data))


def jpeg_parts(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and bytes of each part of a JPEG's first picture that is needed, in order.

    What follows its end is left out, such as the clip of a motion photo or a second picture.
    """
    yield 0xD8, JPEG_START
    place = 2
    while found := MARKER.search(data, place):
        marker, start = found[1][0], found.end() - 2
        if marker == EOI:
            break
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without content
            place = start + 2
            continue
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        end = start + 2 + max(length, 2)
        if marker == SOS:
            after = AFTER_SCAN.search(data, end)
            end = after.start() if after else len(data)
        content = data[start + 4 : end]
        if marker not in METADATA or content.startswith(KEPT_SEGMENTS.get(marker, ())):
            yield marker, data[start:end]
        place = end
    yield EOI, b"\xff\xd9"


def _needed_png(data: bytes) -> bytes:
    colour_type = data[25] if len(data) > 25 else 0
    kept, exif = [PNG_START], b""
    for kind, content, chunk in _png_chunks(data):
        if not kind[0] & 0x20:  # critical, so its checksum matters
            if kind == b"IDAT" and exif:
                kept.append(_chunk(b"eXIf", exif))
                exif = b""
            kept.append(chunk)
        elif kind in (b"tEXt", b"zTXt"):
            exif = exif or _exif_in_text(kind, content)
        elif (
            kind == b"eXIf"
            or (kind == b"iCCP" and _is_readable_profile(content))
            or (kind == b"tRNS" and len(content) in TRANSPARENCY_BYTES.get(colour_type, ()))
        ):
            kept.append(_chunk(kind, content))
    if exif:  # after the picture
        kept.insert(-1, _chunk(b"eXIf", exif))
    return b"".join(kept)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield kind, content and all bytes of each chunk; an ancillary chunk only if it is complete."""
    place = len(PNG_START)
    while len(head := data[place : place + 8]) == 8:
        length, kind = struct.unpack(">I4s", head)
        content = data[place + 8 : place + 8 + length]
        if len(content) == length or not kind[0] & 0x20:
            yield kind, content, data[place : place + 12 + length]
        place += length + 12


def _chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk with the checksum that belongs to it."""
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


def _is_readable_profile(content: bytes) -> bool:
    method, packed = (rest := content.partition(b"\0")[2])[:1], rest[1:]
    return method == b"\0" and _unpack(packed, MAX_PROFILE_BYTES) is not None


def _exif_in_text(kind: bytes, content: bytes) -> bytes:
    """Return the EXIF in a text chunk, from its TIFF header on; nothing if there is none that can be read."""
    keyword, _, text = content.partition(b"\0")
    if keyword != EXIF_TEXT:
        return b""
    if kind == b"zTXt":
        text = _unpack(text[1:], 2 * MAX_EXIF_BYTES) or b""
    try:
        _, _, _, digits = text.split(b"\n", 3)  # an empty line, "exif", the length
        return bytes.fromhex(digits.decode("ascii", "replace")).removeprefix(b"Exif\0\0")
    except ValueError:
        return b""


def _unpack(packed: bytes, most: int) -> bytes | None:
    """Return what zlib packed, None if it is damaged or longer than `most`."""
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(packed, most)
    except zlib.error:
        return None
    return content if unpacking.eof else None
