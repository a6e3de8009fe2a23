"""The child process that decodes a picture; lib/video/images.py runs it with the picture's path.

Messages: `I` {"width", "height"} (JSON), `F` the pixels (RGB, rows from the top). An error is the rest of a
sentence that begins with the picture's name.
"""

import io
import json
import sys
import warnings
from itertools import chain, product
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageCms

from lib.sandbox.child import Out, Refused, run
from lib.video.picture_parts import count_scans, needed_parts

MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's threshold for decompression bombs, 256 MiB of RGB."""
MAX_SIDE = 4096
"""A larger picture is scaled down to this: three times the longest side that any model takes."""
MAX_SCANS = 64
"""Scans of a progressive JPEG, each of which takes the time of a complete picture; usual are up to 14."""
MAX_DIFFERENCE = 2
"""The most by which an ICC profile's colours may differ from sRGB's, of 255, to be taken for the same."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
"""Formats that Pillow decodes itself; EPS would go to Ghostscript, which runs programs in the file."""
KNOWN = "PNG, JPEG, WebP, GIF, AVIF, TIFF or BMP"
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientations; 1 is upright."""
PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of an ICC profile -> mode of the pictures that it can be for, without alpha."""


def serve(arguments: list[str], out: Out) -> None:
    """Send the picture at the path in `arguments`."""
    (path,) = arguments
    warnings.simplefilter("ignore")
    try:
        picture = _read(Path(path).read_bytes())
    except (Refused, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Refused(f"has more than {MAX_IMAGE_PIXELS / 1e6:.0f} megapixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise Refused(f"is not an image that can be read: give a {KNOWN} file") from None
    except Exception as error:  # a damaged file makes decoders raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Refused(f"cannot be read: {reason:.200}") from None
    out.send(b"I", json.dumps({"width": picture.width, "height": picture.height}).encode())
    out.send(b"F", picture.tobytes())


def _read(data: bytes) -> Image.Image:
    if count_scans(data) > MAX_SCANS:
        raise Refused(f"cannot be read: it is a JPEG of more than {MAX_SCANS} scans; save it again")
    with Image.open(io.BytesIO(needed_parts(data)), formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise Refused(
                f"is {image.width}x{image.height}, more than the {MAX_IMAGE_PIXELS / 1e6:.0f} megapixels "
                "allowed: make it smaller"
            )
        image.draft(None, _size_within(image.size))  # a JPEG is decoded at the smallest size that is enough
        image.load()
        turn = TURNS.get(_orientation(image))  # after load(), which itself turns a TIFF
        # Colours are converted after scaling, which is the quicker of the two.
        picture = _to_rgb(_to_srgb(_scaled(_with_channels(image)), image.info.get("icc_profile")))
    return picture.transpose(turn) if turn else picture


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 where there is none that can be read; nothing else of EXIF matters."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
        if isinstance(value, (bytes, tuple, list)):  # of another type than the standard's, or repeated
            value = next(each for each in value if each)
        return int(value)
    except Exception:
        return 1


def _with_channels(image: Image.Image) -> Image.Image:
    """Return a picture whose pixels can be scaled and converted: no palette, and 8 bits for each channel."""
    if image.mode.startswith("I") or image.mode == "F":
        return _to_eight_bits(image)
    if image.mode in ("P", "PA", "1") or "transparency" in image.info:
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image


def _scaled(image: Image.Image) -> Image.Image:
    if max(image.size) <= MAX_SIDE:
        return image
    return image.resize(_size_within(image.size), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _size_within(size: tuple[int, int]) -> tuple[int, int]:
    """Return the size to which a picture is scaled."""
    scale = min(1.0, MAX_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _to_srgb(image: Image.Image, content: bytes | None) -> Image.Image:
    """Convert from an ICC profile; one that does not fit the picture, or changes nothing, is ignored."""
    if not content:
        return image
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    colours = image.convert(image.mode.removesuffix("A")) if alpha else image
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(content))
        facts: Any = profile.profile
        if colours.mode != PROFILE_MODES.get(facts.xcolor_space):
            return image
        if colours.mode == "RGB" and _is_like_srgb(profile):
            return image
        shown = _converted(colours, profile)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    if alpha is not None:
        shown.putalpha(alpha)
    return shown


def _is_like_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    """Return whether a profile moves no colour visibly; many have sRGB's values, whatever their names say."""
    levels = bytes(range(0, 256, 51))
    colours = Image.frombytes("RGB", (6, 36), bytes(chain.from_iterable(product(levels, repeat=3))))
    moved = ImageChops.difference(colours, _converted(colours, profile))
    return max(moved.tobytes()) <= MAX_DIFFERENCE


def _converted(colours: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    srgb = ImageCms.createProfile("sRGB")
    shown = ImageCms.profileToProfile(colours, profile, srgb, outputMode="RGB", renderingIntent=intent)
    assert shown is not None, "it is not converted in place"
    return shown


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert a grey image of 16 or 32 bits, or floats in 0..1 or 0..255, to 8 bits."""
    import numpy as np  # not at the top: it takes as long to import as all the rest, and few pictures need it

    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    if image.mode == "F":
        values *= 255 if values.max() <= 1 else 1
    else:
        values *= np.float32(1 / 257)
    return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))


if __name__ == "__main__":
    sys.exit(run(serve))
