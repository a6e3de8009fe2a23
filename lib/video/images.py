"""Reading uploaded images, and fitting them to a model's size."""

import struct
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from lib.errors import UserError

MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's threshold for decompression bombs, 256 MiB of RGB."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
"""Formats that Pillow decodes itself; EPS would go to Ghostscript, which runs programs in the file."""


def read_image(path: str | Path, *, name: str | None = None) -> Image.Image:
    """Read an image as 8-bit RGB, turned by its EXIF orientation, with transparency over white.

    Animations give their first frame; 16-bit and float images are scaled to 8 bits, not clipped. `name`, by
    default the file's name, is used in messages. Raises UserError for a file that is not an image, is
    damaged, or has more than MAX_IMAGE_PIXELS pixels.
    """
    name = name or Path(path).name
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UserError(
                    f"{name} is {image.width}x{image.height}, more than the "
                    f"{MAX_IMAGE_PIXELS / 1e6:.0f} megapixels allowed: make it smaller"
                )
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {MAX_IMAGE_PIXELS / 1e6:.0f} megapixels") from None
    except Image.UnidentifiedImageError:
        known = "PNG, JPEG, WebP, GIF, AVIF, TIFF or BMP"
        raise UserError(f"{name} is not an image that can be read: give a {known} file") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read: {reason}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert a grey image of 16 or 32 bits, or floats in 0..1 or 0..255, to 8 bits."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        values *= 255 if values.max() <= 1 else 1
    else:
        values *= 1 / 257
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))


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
