"""The child process that decodes a picture; lib/video/images.py runs it with the picture's path.

Messages: `I` {"width", "height"} (JSON), `F` the pixels (RGB, rows from the top). An error is the rest of a
sentence that begins with the picture's name.
"""

import io
import json
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

from PIL import Image, ImageCms

from lib.sandbox.child import Out, Refused, run

MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's threshold for decompression bombs, 256 MiB of RGB."""
MAX_SIDE = 4096
"""A larger picture is scaled down to this: three times the longest side that any model takes."""
MAX_SCANS = 64
"""Scans of a progressive JPEG, each of which takes the time of a complete picture; usual are up to 14."""
MAX_PROFILE_BYTES = 1 << 20
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
PNG_START = b"\x89PNG\r\n\x1a\n"
PROFILE_MODES = {"RGB ": ("RGB", "RGBA"), "GRAY": ("L", "LA"), "CMYK": ("CMYK",)}
"""Colour space of an ICC profile -> modes of the pictures that it can be for."""


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
    if data.startswith(PNG_START):
        data = _needed_chunks(data)
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise Refused(f"cannot be read: it is a JPEG of more than {MAX_SCANS} scans; save it again")
    with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise Refused(
                f"is {image.width}x{image.height}, more than the {MAX_IMAGE_PIXELS / 1e6:.0f} megapixels "
                "allowed: make it smaller"
            )
        turn = TURNS.get(_orientation(image))
        image.load()
        picture = _to_rgb(_to_srgb(image))
    if max(picture.size) > MAX_SIDE:
        scale = MAX_SIDE / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return picture.transpose(turn) if turn else picture


def _needed_chunks(data: bytes) -> bytes:
    """Return a PNG without the chunks that are not needed to show it, which may be damaged or huge."""
    kept, place = [PNG_START], len(PNG_START)
    while len(head := data[place : place + 8]) == 8:
        length, kind = struct.unpack(">I4s", head)
        content = data[place + 8 : place + 8 + length]
        place += length + 12
        if not kind[0] & 0x20:  # critical, so its checksum matters
            kept.append(data[place - length - 12 : place])
        elif len(content) == length and _is_needed(kind, content):
            kept += [head, content, struct.pack(">I", zlib.crc32(kind + content))]
    return b"".join(kept)


def _is_needed(kind: bytes, content: bytes) -> bool:
    if kind == b"iCCP":
        packed = content.partition(b"\0")[2][1:]
        try:
            unpacking = zlib.decompressobj()
            unpacking.decompress(packed, MAX_PROFILE_BYTES)
            return unpacking.eof
        except zlib.error:
            return False
    return kind in (b"tRNS", b"eXIf") or (kind == b"zTXt" and content.startswith(b"Raw profile type exif\0"))


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 where there is none that can be read; nothing else of EXIF matters."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert from the colour profile in the file; a profile that does not fit the picture is ignored."""
    content = image.info.get("icc_profile")
    if not content:
        return image
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(content))
        facts: Any = profile.profile
        if image.mode not in PROFILE_MODES.get(facts.xcolor_space, ()):
            return image
        if "srgb" in (facts.profile_description or "").lower():
            return image
        alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
        colours = image.convert(image.mode.removesuffix("A")) if alpha else image
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        target = ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(colours, profile, target, outputMode="RGB", renderingIntent=intent)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    if shown is None:
        return image
    if alpha is not None:
        shown.putalpha(alpha)
    elif "transparency" in image.info and image.mode == "RGB":
        shown.putalpha(image.convert("RGBA").getchannel("A"))
    return shown


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_eight_bits(image).convert("RGB")
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
