"""The image that a request passes to the model, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from lib.generation.request import build_request
from lib.models.specs import SPECS
from tiny.evaluate import DEFAULTS

RED, WHITE, BLACK = (225, 30, 30), (248, 248, 248), (0, 0, 0)
WIDTH, HEIGHT = SPECS["tiny-i2v"].width, SPECS["tiny-i2v"].height


def first_frame(image_fit: str) -> np.ndarray:
    """int16 [48, 64, 3]: what the model gets of a narrow white picture with a red strip along its top."""
    tall = np.full((200, 60, 3), WHITE, np.uint8)
    tall[:20] = RED
    settings = DEFAULTS | {"prompt": "x", "seed": 0, "image": Image.fromarray(tall), "image_fit": image_fit}
    return np.asarray(build_request(SPECS["tiny-i2v"], **settings).image).astype(np.int16)


def is_near(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """Whether every pixel is that colour, but for what resampling changes."""
    return bool((abs(pixels - np.array(colour)) <= 12).all())


def test_pad_shows_everything_between_black_sides():
    frame = first_frame("pad")
    inner = round(60 * HEIGHT / 200)
    left = (WIDTH - inner) // 2
    assert (frame[:, :left] == BLACK).all() and (frame[:, left + inner :] == BLACK).all()
    shown = frame[:, left : left + inner]
    assert is_near(shown[:3], RED) and is_near(shown[8:], WHITE)


def test_crop_fills_the_frame_and_cuts_the_strip_away():
    assert is_near(first_frame("crop"), WHITE)


def test_stretch_draws_the_strip_across_the_full_width():
    frame = first_frame("stretch")
    assert is_near(frame[:3], RED) and is_near(frame[8:], WHITE)


@pytest.mark.parametrize("image_fit", ["crop", "pad", "stretch"])
def test_a_picture_of_the_right_size_is_unchanged(image_fit):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    settings = DEFAULTS | {"prompt": "x", "seed": 0, "image": Image.fromarray(pixels), "image_fit": image_fit}
    assert np.array_equal(np.asarray(build_request(SPECS["tiny-i2v"], **settings).image), pixels)
