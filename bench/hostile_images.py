"""Hostile pictures: damaged files of every format that is read, read as the service does.

script/bench hostile-images [--count 300] [--seed 0]

Prints what was read and refused, the longest reading and the most memory of a child, by format. Ends with
status 1 if a reading took more than 10 s or 1 GiB, raised anything but UserError, or changed what is read
next. Needs no GPU.
"""

import argparse
import io
import multiprocessing
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from bench._arguments import at_least_one
from lib.errors import UserError
from lib.video.images import read_image

MAX_SECONDS = 10.0
MAX_BYTES = 1 << 30
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
DAMAGES = ("cut", "flipped", "huge", "many")
ANIMATED = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")
HUGE_SIDES = (9_459, 16_383, 65_535, 89_478_485, 0x7FFFFFFF)
"""The first is within the limit of pixels in a square; each format takes the largest that its field holds."""


class Result(NamedTuple):
    """What came of the pictures of one format."""

    kind: str
    read: int
    refused: int
    seconds: float
    child_bytes: int
    faults: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="script/bench hostile-images", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--count", type=at_least_one, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shares = [(kind, range(place, options.count, len(FORMATS)), options.seed)
              for place, kind in enumerate(FORMATS)]  # fmt: skip
    # A process for each format: the memory of children is known only as the most of all of a process.
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        results = pool.starmap(read_share, shares, chunksize=1)
    print(f"{options.count} pictures, seed {options.seed}")
    print("| format | read | refused | longest | most memory |\n|---|---|---|---|---|")
    for each in results:
        print(f"| {each.kind} | {each.read} | {each.refused} | {each.seconds:.1f} s "
              f"| {each.child_bytes / 1e6:.0f} MB |")  # fmt: skip
    faults = [fault for each in results for fault in each.faults]
    print("\n".join(faults) or "no faults")
    sys.exit(bool(faults))


def read_share(kind: str, places: range, seed: int) -> Result:
    """Read the pictures of one format, and after each the reference."""
    read, refused, worst, faults = 0, 0, 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        path, reference = Path(folder) / "hostile", Path(folder) / "reference.png"
        drawn = draw(random.Random(seed))
        drawn.save(reference)
        for number, place in enumerate(places):
            damage = DAMAGES[number % len(DAMAGES)]
            label = f"{kind} {damage}, number {place}"
            path.write_bytes(make_hostile(kind, damage, random.Random(f"{seed} {place}")))
            started = time.monotonic()
            try:
                read_image(path)
                read += 1
            except UserError:
                refused += 1
            except Exception as error:  # what this looks for
                faults.append(f"{label}: raised {type(error).__name__}: {error}")
            seconds = time.monotonic() - started
            worst = max(worst, seconds)
            if seconds > MAX_SECONDS:
                faults.append(f"{label}: took {seconds:.1f} s")
            if read_image(reference).tobytes() != drawn.tobytes():
                faults.append(f"{label}: the reference differs after it")
    child_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if child_bytes > MAX_BYTES:
        faults.append(f"{kind}: a child took {child_bytes / 1e6:.0f} MB")
    return Result(kind, read, refused, worst, child_bytes, faults)


def make_hostile(kind: str, damage: str, rng: random.Random) -> bytes:
    """Return a picture of the format `kind` with the given damage."""
    content = bytearray(many_parts(kind, rng) if damage == "many" else encode(kind, [draw(rng)]))
    if damage == "cut":
        del content[rng.randrange(1, len(content)) :]
    elif damage == "huge":
        declare_size(kind, content, rng)
    elif damage == "flipped" or kind not in (*ANIMATED, "JPEG"):  # the others have no parts to repeat
        for _ in range(rng.choice((1, 10, 100))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def draw(rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (64, 48), rng.randbytes(64 * 48 * 3))


def encode(kind: str, frames: list[Image.Image]) -> bytes:
    file = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
    frames[0].save(file, kind, **more)
    return file.getvalue()


def many_parts(kind: str, rng: random.Random) -> bytes:
    """Return a picture of many scans, strips or frames."""
    count = rng.choice((20, 200))
    if kind == "JPEG":
        file = io.BytesIO()
        draw(rng).resize((2000, 2000)).save(file, kind, progressive=True)
        content = file.getvalue()
        last = content.rindex(b"\xff\xda")
        return content[:-2] + content[last:-2] * count + b"\xff\xd9"
    if kind == "TIFF" and rng.random() < 0.5:
        file = io.BytesIO()
        draw(rng).resize((64, 5000)).save(file, kind, compression="tiff_lzw", tiffinfo={278: 1})
        return file.getvalue()
    return encode(kind, [draw(rng) for _ in range(count if kind in ANIMATED else 1)])


def declare_size(kind: str, content: bytearray, rng: random.Random) -> None:
    """Write a huge width and height into the header of a picture."""
    side, other = rng.choice(HUGE_SIDES), rng.choice((1, *HUGE_SIDES))
    if kind == "PNG":
        struct.pack_into(">II", content, 16, side, other)
        struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    elif kind == "PPM":
        content[:9] = b"P6\n%d %d" % (side, other)
    elif kind == "TIFF":
        directory = struct.unpack_from("<I", content, 4)[0]
        for entry in range(struct.unpack_from("<H", content, directory)[0]):
            place = directory + 2 + entry * 12
            tag = struct.unpack_from("<H", content, place)[0]
            if tag in (256, 257):  # as LONG
                struct.pack_into("<HII", content, place + 2, 4, 1, side if tag == 256 else other)
    elif kind == "JPEG":
        struct.pack_into(
            ">HH", content, content.index(b"\xff\xc0") + 5, min(other, 65_535), min(side, 65_535)
        )
    elif kind in ("AVIF", "JPEG2000"):
        name, skip = (b"ispe", 8) if kind == "AVIF" else (b"ihdr", 4)
        struct.pack_into(">II", content, content.index(name) + skip, other, side)
        if kind == "JPEG2000":
            struct.pack_into(">II", content, content.index(b"\xff\x51") + 6, side, other)
    elif kind == "BMP":
        struct.pack_into("<II", content, 18, side, other)
    elif kind == "ICO":  # the picture inside is a PNG
        place = content.index(b"IHDR")
        struct.pack_into(">II", content, place + 4, side, other)
        struct.pack_into(">I", content, place + 17, zlib.crc32(content[place : place + 17]))
    else:
        place, most = {"GIF": (6, 65_535), "TGA": (12, 65_535), "WEBP": (26, 16_383)}[kind]
        struct.pack_into("<HH", content, place, min(side, most), min(other, most))


if __name__ == "__main__":
    main()
