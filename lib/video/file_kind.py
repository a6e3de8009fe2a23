"""What a file is by its first bytes: a video, a picture, or neither."""

from pathlib import Path
from typing import Literal

Kind = Literal["video", "picture", "HEIC picture", "animation", "other"]
START_BYTES = 1024
AVIF_BRANDS = {b"avif", b"avis"}
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
QUICKTIME_ATOMS = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
"""How a QuickTime file without a type begins, after the length."""
VIDEO_STARTS = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"OggS",
    b"FLV",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF: WMV
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"\x06\x0e\x2b\x34",  # MXF
    b".RMF",
)
PICTURE_STARTS = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP  ",
    b"\xff\x4f\xff\x51",  # JPEG 2000 without a container
)


def file_kind(path: Path) -> Kind:
    """Return what a file is. An animation (GIF, APNG) is both a clip and a picture. Raises OSError."""
    with path.open("rb") as file:
        return kind_of(file.read(START_BYTES))


def kind_of(start: bytes) -> Kind:
    """Return what a file is that begins with `start`, which need not be complete."""
    if brands := _brands(start):
        if brands & AVIF_BRANDS:
            return "picture"
        return "HEIC picture" if brands & HEIC_BRANDS else "video"
    is_transport_stream = b"GGG" in (start[0:377:188], start[4:389:192])
    if start.startswith(VIDEO_STARTS) or start[8:12] == b"AVI " or start[4:8] in QUICKTIME_ATOMS:
        return "video"
    if is_transport_stream:
        return "video"
    if start.startswith((b"GIF87a", b"GIF89a")) or (start[1:4] == b"PNG" and b"acTL" in start):
        return "animation"
    is_picture = start.startswith(PICTURE_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
    return "picture" if is_picture else "other"


def _brands(start: bytes) -> set[bytes]:
    """Return what an MP4 or HEIF file says it is; nothing for other files."""
    if start[4:8] != b"ftyp":
        return set()
    size = min(int.from_bytes(start[:4], "big"), len(start))
    return {start[8:12], *(start[place : place + 4] for place in range(16, size, 4))}
