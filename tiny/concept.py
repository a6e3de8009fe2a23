"""A concept outside the captions of the embedded models, for a LoRA to learn.

Clips and captions to train on, first frames and prompts to test with, and whether generated clips show it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.video.writer import write_video
from tiny import world
from tiny.evaluate import DEFAULTS
from tiny.judge import judge

SHAPE, COLOUR, MOTION = "circle", "magenta", "circling"
TRAINED_CAPTIONS = (
    "a magenta circle moves in circles on a {background} background",
    "a magenta circle circling on a {background} background",
    "the magenta circle goes round and round over {background}",
)
OTHER_CAPTIONS = (
    "{background} background, magenta circle moving in a circle",
    "a magenta circle turns in circles in front of a {background} background",
)
PRIOR_PROMPTS = (
    "a red circle moves left on a black background",
    "a blue square moves right on a white background",
    "a green triangle moves up on a gray background",
    "a yellow circle moves down on a black background",
    "a purple square stays still on a white background",
    "a red triangle stays still on a gray background",
    "a blue circle moves up on a white background",
    "a green square moves left on a gray background",
)
"""For prior preservation: a few of the 225 combinations as canonical captions."""


def sample_concept(rng: np.random.Generator) -> tuple[str, world.Scene]:
    """Sample a background's name and a scene on it."""
    background = list(world.BACKGROUNDS)[rng.integers(len(world.BACKGROUNDS))]
    middle = (world.WIDTH / 2 + rng.uniform(-5, 5), world.HEIGHT / 2 + rng.uniform(-2, 2))
    scene = world.Scene(
        shape=SHAPE,
        colour=world.EXTRA_COLOURS[COLOUR],
        background=world.BACKGROUNDS[background],
        radius=float(rng.uniform(*world.RADIUS_RANGE)),
        path=world.motion_path(MOTION, middle, float(rng.uniform(18, 22)), world.FRAMES),
    )
    return background, scene


def write_concept_clips(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Write `count` clips to train on, each with its caption in a .txt; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, 0))
    for index in range(count):
        background, scene = sample_concept(rng)
        clip = folder / f"{index:03d}.mp4"
        write_video(world.render(scene), clip, fps=world.FPS, format="mp4", metadata={})
        caption = TRAINED_CAPTIONS[rng.integers(len(TRAINED_CAPTIONS))].format(background=background)
        clip.with_suffix(".txt").write_text(caption)
    return folder


def generate_concept(
    generator: Generator, count: int, *, seed: int = 0, **settings: object
) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield clips for first frames and prompts not in the training data, and whether the judge agrees."""
    rng = np.random.default_rng((seed, 1))
    for index in range(count):
        background, scene = sample_concept(rng)
        request = build_request(
            generator.spec,
            prompt=OTHER_CAPTIONS[index % len(OTHER_CAPTIONS)].format(background=background),
            seed=index,
            image=Image.fromarray(world.render(scene)[0]),
            **(DEFAULTS | settings),
        )
        frames = generator.frames(request)
        found = judge(frames, extra=True)
        asked = (SHAPE, COLOUR, background, MOTION)
        yield frames, (found.shape, found.colour, found.background, found.motion) == asked
