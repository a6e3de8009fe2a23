"""Reading uploaded images, and fitting them to a model's size."""

import json
from pathlib import Path
from typing import Literal

from PIL import Image

from lib.errors import UserError
from lib.sandbox.process import RefusedError, SandboxError, start
from lib.video.file_kind import file_kind

DECODER_BYTES = 3 << 30
DECODER_SECONDS = 30.0
DECODER_CPU_SECONDS = 10.0


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
        kind = file_kind(path)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    if kind == "HEIC picture":
        return "a HEIC picture, which cannot be read here: give a JPEG or PNG file"
    if kind == "video":
        return "a video, and a picture is needed here: give a JPEG or PNG file, such as one of its frames"
    return None


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
