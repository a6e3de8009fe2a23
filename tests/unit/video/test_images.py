"""Reading images and fitting them to a size."""

import io
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

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
        (b"iCCP", b"profile\0\1" + zlib.compress(bytes(100)), None),
        (b"tRNS", b"\0\0\0", None),
        (b"zTXt", b"Raw profile type exif\0\0damaged", None),
        (b"tEXt", b"Raw profile type exif\0\nexif\n   4\nno digits", None),
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


VIDEO_STARTS = {
    "MP4": b"\0\0\0\x20ftypisom",
    "QuickTime of old": b"\0\0\0\x08wide\0\0\0\0mdat",
    "Matroska": b"\x1aE\xdf\xa3",
    "AVI": b"RIFF\0\0\0\0AVI LIST",
    "FLV": b"FLV\1\5",
    "WMV": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    "MPEG program stream": b"\0\0\1\xba",
    "MPEG transport stream": (b"G" + bytes(187)) * 3,
    "transport stream of a camera": (bytes(4) + b"G" + bytes(187)) * 3,
}


@pytest.mark.parametrize("kind", VIDEO_STARTS)
def test_a_video_is_named_as_one(tmp_path, kind):
    (tmp_path / "file.png").write_bytes(VIDEO_STARTS[kind] + bytes(1000))
    with pytest.raises(UserError, match="the given image is a video, and a picture is needed here"):
        images.read_image(tmp_path / "file.png", name="the given image")


def test_a_heic_picture_is_named_and_an_avif_with_its_brand_is_read(tmp_path):
    (tmp_path / "file.png").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(UserError, match="the given image is a HEIC picture"):
        images.read_image(tmp_path / "file.png", name="the given image")
    Image.new("RGB", (16, 16), (10, 200, 30)).save(tmp_path / "plain.avif")
    content = (tmp_path / "plain.avif").read_bytes()
    assert content[8:12] == b"avif" and b"mif1" in content[16:32]
    (tmp_path / "other.avif").write_bytes(content[:8] + b"mif1" + content[12:])
    shown = images.read_image(tmp_path / "other.avif").getpixel((5, 5))
    assert max(abs(each - right) for each, right in zip(shown, (10, 200, 30), strict=True)) <= 3


def half_and_half() -> Image.Image:
    """A picture that is red on the left and blue on the right."""
    drawn = Image.new("RGB", (40, 20), (0, 0, 255))
    drawn.paste((255, 0, 0), (0, 0, 20, 20))
    return drawn


def exif_of(orientation: int, *, kind: int = 3) -> bytes:
    """EXIF with nothing but an orientation; `kind` is 1 BYTE, 3 SHORT, 4 LONG, 7 UNDEFINED."""
    value = {1: struct.pack("<Bxxx", orientation), 7: struct.pack("<Bxxx", orientation)}
    entry = struct.pack("<HHI", 0x0112, kind, 1) + value.get(kind, struct.pack("<I", orientation))
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


def assert_is_turned_right(path: Path) -> None:
    shown = images.read_image(path)
    assert shown.size == (20, 40)
    top, bottom = shown.getpixel((10, 5)), shown.getpixel((10, 35))
    assert top[0] > 200 > 60 > top[2] and bottom[2] > 200 > 60 > bottom[0]


@pytest.mark.parametrize("kind", [1, 3, 4, 7])
def test_an_orientation_of_any_type_is_honoured(tmp_path, kind):
    half_and_half().save(tmp_path / "photo.jpg", exif=b"Exif\0\0" + exif_of(6, kind=kind), quality=95)
    assert_is_turned_right(tmp_path / "photo.jpg")


def test_a_tiff_is_turned_once(tmp_path):
    half_and_half().save(tmp_path / "scan.tif", tiffinfo={0x0112: 6})
    assert_is_turned_right(tmp_path / "scan.tif")


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt"])
@pytest.mark.parametrize("padding", [0, 1_500_000])
def test_the_orientation_in_a_text_chunk_is_honoured(tmp_path, kind, padding):
    exif = b"Exif\0\0" + exif_of(6) + bytes(padding)
    text = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
    content = b"Raw profile type exif\0" + (b"\0" + zlib.compress(text) if kind == b"zTXt" else text)
    half_and_half().save(tmp_path / "plain.png")
    photo = with_chunk((tmp_path / "plain.png").read_bytes(), kind, content)
    (tmp_path / "photo.png").write_bytes(photo)
    assert_is_turned_right(tmp_path / "photo.png")


def test_a_text_chunk_after_the_picture_is_honoured(tmp_path):
    half_and_half().save(tmp_path / "plain.png")
    plain, end = (content := (tmp_path / "plain.png").read_bytes())[:-12], content[-12:]
    chunk = with_chunk(bytes(33), b"eXIf", exif_of(6))[33:]
    (tmp_path / "photo.png").write_bytes(plain + chunk + end)
    assert_is_turned_right(tmp_path / "photo.png")


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


@pytest.mark.parametrize(
    "added",
    [
        segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\xff\xff damaged"),
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\xff\xff\xff\xff"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation='wrong'"),
        segment(0xFE, b"\xff\xda" * 200),
        segment(0xE4, bytes(60_000)),
    ],
    ids=["MPF", "Photoshop", "XMP", "comment", "unknown"],
)
def test_segments_that_are_not_needed_do_not_refuse_a_photo(tmp_path, added):
    half_and_half().save(tmp_path / "photo.jpg", exif=b"Exif\0\0" + exif_of(6), quality=95)
    content = (tmp_path / "photo.jpg").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(content[:2] + added + content[2:])
    assert_is_turned_right(tmp_path / "photo.jpg")


def test_the_clip_behind_a_motion_photo_is_not_part_of_it(tmp_path):
    half_and_half().save(tmp_path / "plain.jpg", exif=b"Exif\0\0" + exif_of(6), progressive=True, quality=95)
    clip = b"\0\0\0\x18ftypmp42" + b"\xff\xda\x12\x34" * 5000
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "plain.jpg").read_bytes() + clip)
    assert_is_turned_right(tmp_path / "photo.jpg")


def test_a_profile_is_judged_by_its_colours_and_not_by_its_name(tmp_path):
    with Image.open(DATA / "images" / "icc_p3.png") as tagged:
        right = images.read_image(DATA / "images" / "icc_p3.png")
        profile = bytearray(tagged.info["icc_profile"])
        place, size = struct.unpack(">II", profile[profile.index(b"desc", 128) + 4 :][:8])
        name = b"sRGB IEC61966-2.1"
        renamed = b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name
        assert size >= len(renamed)
        profile[place : place + size] = renamed.ljust(size, b"\0")
        assert ImageCms.getProfileDescription(io.BytesIO(profile)).startswith("sRGB")
        tagged.save(tmp_path / "renamed.png", icc_profile=bytes(profile))
    assert images.read_image(tmp_path / "renamed.png").tobytes() == right.tobytes()


def test_a_picture_with_the_profile_of_srgb_keeps_its_values(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png", icc_profile=profile)
    assert (np.asarray(images.read_image(tmp_path / "noise.png")) == noise).all()


def test_a_large_photo_with_a_profile_is_read(tmp_path):
    with Image.open(DATA / "images" / "icc_p3.png") as tagged:
        profile = tagged.info["icc_profile"]
    Image.new("RGB", (9000, 5000), (200, 40, 40)).save(tmp_path / "large.jpg", icc_profile=profile)
    large = images.read_image(tmp_path / "large.jpg")
    assert large.size == (4096, 2276)
    assert large.getpixel((9, 9))[0] > 205, "Display P3's red is a stronger one in sRGB"
