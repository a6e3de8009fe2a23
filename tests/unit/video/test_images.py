"""Reading images and fitting them to a size."""

import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.errors import UserError
from lib.video import images

DATA = Path(__file__).parents[2] / "data"


def test_applies_the_exif_orientation(tmp_path):
    photo = Image.new("RGB", (40, 20), (0, 0, 255))
    photo.paste((255, 0, 0), (0, 0, 20, 20))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    photo.save(tmp_path / "photo.png", exif=exif)
    upright = images.read_image(tmp_path / "photo.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0) and upright.getpixel((10, 35)) == (0, 0, 255)


def test_shows_transparency_over_white(tmp_path):
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    drawing.putpixel((1, 1), (200, 0, 0, 255))
    drawing.putpixel((2, 2), (0, 0, 0, 128))
    drawing.save(tmp_path / "drawing.png")
    shown = images.read_image(tmp_path / "drawing.png")
    assert shown.mode == "RGB"
    assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((1, 1)) == (200, 0, 0)
    assert shown.getpixel((2, 2)) == (127, 127, 127)


def test_shows_a_transparent_palette_colour_over_white(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    shown = images.read_image(tmp_path / "palette.png")
    assert shown.getpixel((0, 0)) == (255, 255, 255) and shown.getpixel((3, 3)) == (10, 20, 30)


@pytest.mark.parametrize(
    ("pixels", "name"),
    [
        (np.array([[0, 32896, 65535]], np.uint16), "depth16.png"),
        (np.array([[0, 32896, 65535]], np.int32), "depth32.tif"),
        (np.array([[0, 128 / 255, 1]], np.float32), "float.tif"),
    ],
)
def test_scales_grey_images_of_more_than_eight_bits(tmp_path, pixels, name):
    Image.fromarray(pixels).save(tmp_path / name)
    read = np.asarray(images.read_image(tmp_path / name))
    assert read.tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


def test_reads_cmyk_and_the_first_frame_of_animations(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    red = images.read_image(tmp_path / "print.jpg").getpixel((4, 4))
    assert red[0] > 220 and max(red[1:]) < 60
    steps = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("steps.gif", "steps.webp"):
        steps[0].save(tmp_path / name, save_all=True, append_images=steps[1:], lossless=True)
        assert images.read_image(tmp_path / name).getpixel((4, 4)) == (255, 0, 0)


def test_refuses_files_that_are_not_images(tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    # An EPS file is a program for Ghostscript, which Pillow would run.
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    for name in ("notes.png", "empty.jpg", "page.eps"):
        with pytest.raises(UserError, match=f"{name} is not an image that can be read"):
            images.read_image(tmp_path / name)
    with pytest.raises(UserError, match=r"missing\.png"):
        images.read_image(tmp_path / "missing.png")


def test_refuses_a_truncated_image_and_a_decompression_bomb(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    with pytest.raises(UserError, match=r"cut\.png cannot be read"):
        images.read_image(tmp_path / "cut.png")
    bomb = bytearray((tmp_path / "whole.png").read_bytes())
    for side, message in ((9_500, "9500x9500"), (60_000, "megapixels")):
        struct.pack_into(">II", bomb, 16, side, side)
        ihdr = bytes(bomb[12:29])
        struct.pack_into(">I", bomb, 29, zlib.crc32(ihdr))
        (tmp_path / "bomb.png").write_bytes(bomb)
        with pytest.raises(UserError, match=message):
            images.read_image(tmp_path / "bomb.png")


def three_stripes() -> Image.Image:
    """120x40: red, green, blue stripes of 40x40 from left to right."""
    image = Image.new("RGB", (120, 40), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 40, 40))
    image.paste((0, 0, 255), (80, 0, 120, 40))
    return image


def test_crop_keeps_the_center_and_fills_the_frame():
    pixels = np.asarray(images.fit_image(three_stripes(), 64, 64, "crop"))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:, 4:-4] == (0, 255, 0)).all()


def test_pad_adds_black_bars():
    pixels = np.asarray(images.fit_image(three_stripes(), 60, 60, "pad"))
    assert pixels.shape == (60, 60, 3)
    assert (pixels[:20] == 0).all() and (pixels[40:] == 0).all()
    assert [pixels[30, x].argmax() for x in (10, 30, 50)] == [0, 1, 2]


def test_stretch_ignores_the_aspect_ratio():
    pixels = np.asarray(images.fit_image(three_stripes(), 30, 90, "stretch"))
    assert pixels.shape == (90, 30, 3)
    assert [pixels[y, x].argmax() for y in (2, 87) for x in (5, 15, 25)] == [0, 1, 2] * 2


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_an_image_of_the_right_size_is_unchanged(mode):
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    assert (np.asarray(images.fit_image(Image.fromarray(noise), 64, 48, mode)) == noise).all()
    assert images.fit_image(Image.fromarray(noise), 1000, 3, mode).size == (1000, 3)


def with_chunk(png: bytes, kind: bytes, content: bytes, *, checksum: int | None = None) -> bytes:
    """Insert a chunk after the header of a PNG."""
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return (
        png[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum) + png[33:]
    )


@pytest.mark.parametrize(
    ("kind", "content", "checksum"),
    [
        (b"zTXt", b"workflow\0\0" + zlib.compress(b"node " * 300_000), None),
        (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"node " * 300_000), None),
        (b"tEXt", b"note\0damaged", 7),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(1_100_000)), None),
        (b"iCCP", b"profile\0\0not compressed", None),
        (b"gAMA", b"no number", None),
        (b"eXIf", b"MM no exif", None),
        (b"pHYs", b"", 0),
    ],
)
def test_chunks_that_are_not_needed_do_not_refuse_a_png(tmp_path, kind, content, checksum):
    drawn = three_stripes()
    drawn.save(tmp_path / "plain.png")
    changed = with_chunk((tmp_path / "plain.png").read_bytes(), kind, content, checksum=checksum)
    (tmp_path / "changed.png").write_bytes(changed)
    assert images.read_image(tmp_path / "changed.png").tobytes() == drawn.tobytes()


@pytest.mark.parametrize("name", ["exif_gps_types.jpg", "exif_gps_undefined.jpg"])
def test_odd_entries_in_exif_neither_refuse_a_photo_nor_hide_its_orientation(name):
    with Image.open(DATA / "images" / name) as stored:
        assert stored.size == (240, 320)
    assert images.read_image(DATA / "images" / name).size == (320, 240)


@pytest.mark.parametrize("name", ["icc_p3.jpg", "icc_p3.png", "icc_adobergb.jpg"])
def test_colour_profiles_are_converted_to_srgb(name):
    pixels = np.asarray(images.read_image(DATA / "images" / name)).reshape(-1, 3).astype(int)
    ball = np.median(pixels[pixels[:, 0] > 180], axis=0)
    assert np.abs(ball - (225, 30, 30)).max() <= 6


def test_a_profile_of_another_kind_of_picture_is_ignored(tmp_path):
    with Image.open(DATA / "images" / "icc_p3.png") as tagged:
        profile = tagged.info["icc_profile"]
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png", icc_profile=profile)
    assert images.read_image(tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)


def test_transparency_stays_with_a_colour_profile(tmp_path):
    with Image.open(DATA / "images" / "icc_p3.png") as tagged:
        profile = tagged.info["icc_profile"]
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.putpixel((1, 1), (255, 255, 255, 255))
    drawing.putpixel((2, 2), (0, 0, 0, 255))
    drawing.save(tmp_path / "drawing.png", icc_profile=profile)
    shown = images.read_image(tmp_path / "drawing.png")
    assert [shown.getpixel((place, place)) for place in range(3)] == [(255,) * 3, (255,) * 3, (0, 0, 0)]


def test_a_large_picture_is_scaled_down_while_it_is_read(tmp_path):
    Image.new("L", (30_000, 2), 200).save(tmp_path / "wide.png")
    wide = images.read_image(tmp_path / "wide.png")
    assert wide.size == (4096, 1) and wide.getpixel((9, 0)) == (200, 200, 200)


def test_hostile_pictures_leave_no_memory_behind(tmp_path):
    scans = io.BytesIO()
    Image.new("L", (64, 64)).save(scans, "jpeg", progressive=True)
    scan = scans.getvalue().partition(b"\xff\xda")[2].partition(b"\xff")[0]
    (tmp_path / "scans.jpg").write_bytes(scans.getvalue()[:-2] + (b"\xff\xda" + scan) * 100 + b"\xff\xd9")
    with pytest.raises(UserError, match=r"scans\.jpg cannot be read: it is a JPEG of more than 64 scans"):
        images.read_image(tmp_path / "scans.jpg")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"one-pixel-in-a-large-tile\.tif cannot be read"):
        images.read_image(DATA / "hostile" / "one-pixel-in-a-large-tile.tif")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_names_a_video_and_a_heic_picture(tmp_path):
    for start, kind in ((b"\0\0\0\x20ftypisom", "a video"), (b"\x1aE\xdf\xa3", "a video"),
                        (b"\0\0\0\x18ftypheic", "a HEIC picture")):  # fmt: skip
        (tmp_path / "file.png").write_bytes(start + bytes(100))
        with pytest.raises(UserError, match=f"the given image is {kind}"):
            images.read_image(tmp_path / "file.png", name="the given image")
