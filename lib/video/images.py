"""Reading uploaded images, and fitting them to a model's size."""

import json
from pathlib import Path
from typing import Literal

from PIL import Image

from lib.errors import UserError
from lib.sandbox.process import RefusedError, SandboxError, start

DECODER_BYTES = 3 << 30
DECODER_SECONDS = 30.0
DECODER_CPU_SECONDS = 10.0
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


def read_image(path: str | Path, *, name: str | None = None) -> Image.Image:
    """Read an image as 8-bit sRGB, turned by its EXIF orientation, with transparency over white.

    It is decoded in a child process with limits on memory and time, and scaled down there if a side has more
    than 4096 pixels. Animations give their first frame; 16-bit and float images are scaled to 8 bits, not
    clipped. `name`, by default the file's name, is used in messages. Raises UserError for a file that is not
    an image, is damaged, or has more than 89 megapixels.
    """
    path = Path(path)
    name = name or path.name
    if other := _other_kind(path, name):
        raise UserError(f"{name} is {other}")
    try:
        with start(
            "lib.video.image_worker",
            [str(path.absolute())],
            memory_bytes=DECODER_BYTES,
            seconds=DECODER_SECONDS,
            cpu_seconds=DECODER_CPU_SECONDS,
        ) as decoder:
            facts = json.loads(decoder.receive(b"I"))
            pixels = decoder.receive(b"F")
    except RefusedError as error:
        raise UserError(f"{name} {error}") from None
    except SandboxError as error:
        raise UserError(f"{name} cannot be read: {error}") from None
    return Image.frombytes("RGB", (facts["width"], facts["height"]), bytes(pixels))


def _other_kind(path: Path, name: str) -> str | None:
    """Return what a file is that is not for Pillow: a video, or a picture of another kind."""
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    if brands := _brands(start):
        if brands & AVIF_BRANDS:
            return None
        if brands & HEIC_BRANDS:
            return "a HEIC picture, which cannot be read here: give a JPEG or PNG file"
    is_transport_stream = b"GGG" in (start[0:377:188], start[4:389:192])
    is_video = start.startswith(VIDEO_STARTS) or start[8:12] == b"AVI " or start[4:8] in QUICKTIME_ATOMS
    if brands or is_video or is_transport_stream:
        return "a video, and a picture is needed here: give a JPEG or PNG file, such as one of its frames"
    return None


def _brands(start: bytes) -> set[bytes]:
    """Return what an MP4 or HEIF file says it is; nothing for other files."""
    if start[4:8] != b"ftyp":
        return set()
    size = min(int.from_bytes(start[:4], "big"), len(start))
    return {start[8:12], *(start[place : place + 4] for place in range(16, size, 4))}


def fit_image(
    image: Image.Image, width: int, height: int, mode: Literal["crop", "pad", "stretch"]
) -> Image.Image:
    """Scale an image to width x height; one of that size is returned unchanged.

    crop: keep the aspect ratio and center-crop. pad: keep the aspect ratio and add black bars. stretch:
    ignore the aspect ratio.
    """
    if image.size == (width, height):
        return image.copy()
    if mode == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if mode == "pad":
        scale = min(width / image.width, height / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        padded = Image.new(image.mode, (width, height))
        inner = image.resize(size, Image.Resampling.LANCZOS)
        padded.paste(inner, ((width - size[0]) // 2, (height - size[1]) // 2))
        return padded
    if mode == "crop":
        scale = max(width / image.width, height / image.height)
        kept = min(image.width, width / scale), min(image.height, height / scale)
        left, top = (image.width - kept[0]) / 2, (image.height - kept[1]) / 2
        box = (left, top, left + kept[0], top + kept[1])
        return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    raise ValueError(f"mode is {mode!r}, not crop, pad or stretch")
