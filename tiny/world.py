"""The synthetic world of the embedded models: one flat shape moving on a plain background.

A `Scene` has everything that `render` needs; `sample_scene` samples one for given attributes. Text-to-video
and image-to-video are trained on the combinations of SHAPES, COLOURS, BACKGROUNDS and MOTIONS, except the
held-out ones. The VAE is also trained on content outside the captions (EXTRA_*).
"""

import itertools
from dataclasses import dataclass

import numpy as np

HEIGHT, WIDTH, FRAMES, FPS = 48, 64, 9, 8

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (225, 30, 30),
    "green": (25, 175, 55),
    "blue": (40, 70, 235),
    "yellow": (245, 220, 35),
    "purple": (170, 40, 190),
}
BACKGROUNDS = {"black": (8, 8, 8), "white": (248, 248, 248), "gray": (128, 128, 128)}
MOTIONS = ("left", "right", "up", "down", "still")

EXTRA_SHAPES = ("star", "ring")
EXTRA_COLOURS = {"magenta": (235, 40, 140), "cyan": (40, 205, 220), "orange": (245, 135, 25)}
EXTRA_MOTIONS = ("circling", "zigzag")

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RADIUS_RANGE = (9.0, 11.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What a caption names and the judge recognizes."""

    shape: str
    colour: str
    background: str
    motion: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A clip in pixels: colours are RGB 0..255, path is [frames, 2] centres as (x, y)."""

    shape: str
    colour: tuple[int, int, int]
    background: tuple[int, int, int]
    radius: float
    path: np.ndarray


ALL_COMBINATIONS = tuple(
    Attributes(shape=s, colour=c, background=b, motion=m)
    for s, c, b, m in itertools.product(SHAPES, COLOURS, BACKGROUNDS, MOTIONS)
)


def is_held_out(attributes: Attributes) -> bool:
    """Return true for 19 of the 225 combinations, spread evenly over all values and their pairs."""
    return (19 * ALL_COMBINATIONS.index(attributes) + 21) % 225 < 19


TRAINED_COMBINATIONS = tuple(a for a in ALL_COMBINATIONS if not is_held_out(a))
HELD_OUT_COMBINATIONS = tuple(a for a in ALL_COMBINATIONS if is_held_out(a))


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the distance in pixels to the outline, negative inside, at offsets x, y from the centre.

    The radius is scaled per shape so that circle, square and triangle of one radius cover similar areas.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.28 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    if shape == "triangle":  # upright and equilateral, centred on its centroid
        inradius = 0.68 * radius
        slanted = np.abs(x) * np.cos(np.pi / 6) - y * np.sin(np.pi / 6)
        return np.maximum(slanted, y) - inradius
    if shape == "star":
        # Five points: fold the angle into one sector, then the distance to the edge line between a tip
        # (radius) and a notch (0.45 radius).
        angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        distance = np.hypot(x, y)
        px, py = distance * np.sin(angle), distance * np.cos(angle)
        tip = np.array([0.0, 1.15 * radius])
        notch = 0.5 * radius * np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)])
        edge = (notch - tip) / np.linalg.norm(notch - tip)
        return -(px - tip[0]) * edge[1] + (py - tip[1]) * edge[0]
    raise ValueError(f"unknown shape {shape!r}")


def coverage(shape: str, centre: tuple[float, float], radius: float, height: int, width: int) -> np.ndarray:
    """Return the anti-aliased coverage [height, width] in 0..1 of a shape at a centre (x, y) in pixels."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    return np.clip(0.5 - signed_distance(shape, x - centre[0], y - centre[1], radius), 0.0, 1.0)


def render(scene: Scene, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Render a scene as uint8 [frames, height, width, 3]; the path is in pixels of a 48x64 frame."""
    scale = height / HEIGHT
    ground, colour = np.array(scene.background, np.float64), np.array(scene.colour, np.float64)
    frames = np.empty((len(scene.path), height, width, 3), np.uint8)
    for i, (x, y) in enumerate(scene.path):
        alpha = coverage(scene.shape, (x * width / WIDTH, y * scale), scene.radius * scale, height, width)
        frames[i] = np.rint(ground + alpha[..., None] * (colour - ground))
    return frames


def motion_path(motion: str, middle: tuple[float, float], travel: float, frames: int) -> np.ndarray:
    """Return the centres [frames, 2] as (x, y) of a steady motion around `middle`; `travel` in pixels."""
    steps = np.linspace(-0.5, 0.5, frames)[:, None]
    if motion == "still":
        return np.tile(np.array(middle, np.float64), (frames, 1))
    if motion == "circling":
        angle = 2 * np.pi * np.linspace(0, 1, frames)
        return np.array(middle) + 0.4 * travel * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if motion == "zigzag":
        wave = np.abs((np.arange(frames) % 4) - 2) - 1.0
        return np.array(middle) + np.stack([travel * steps[:, 0], 0.3 * travel * wave], axis=1)
    return np.array(middle) + steps * travel * np.array(DIRECTIONS[motion])


def sample_scene(
    attributes: Attributes,
    rng: np.random.Generator,
    *,
    from_start: bool = False,
    frames: int = FRAMES,
    radius: float | None = None,
) -> Scene:
    """Sample the geometry of a clip.

    By default the path is centred in the frame, so a shape starts on the far side of its motion. With
    `from_start` the first position is drawn without looking at the motion, so a first frame reveals
    nothing about where the shape will go: what image-to-video needs.
    """
    radius = radius if radius is not None else float(rng.uniform(*RADIUS_RANGE))
    vertical = attributes.motion in ("up", "down")
    if from_start:
        travel = float(rng.uniform(10, 12) if vertical else rng.uniform(14, 18))
        start = np.array([WIDTH / 2 + rng.uniform(-8, 8), HEIGHT / 2 + rng.uniform(-3, 3)])
        direction = np.array(DIRECTIONS.get(attributes.motion, (0, 0)))
        middle = start + 0.5 * travel * direction
    else:
        travel = float(rng.uniform(14, 17) if vertical else rng.uniform(18, 24))
        middle = np.array([WIDTH / 2 + rng.uniform(-4, 4), HEIGHT / 2 + rng.uniform(-3, 3)])
    return Scene(
        shape=attributes.shape,
        colour=COLOURS[attributes.colour],
        background=BACKGROUNDS[attributes.background],
        radius=radius,
        path=motion_path(attributes.motion, (float(middle[0]), float(middle[1])), travel, frames),
    )


def sample_vae_scene(rng: np.random.Generator, frames: int = FRAMES) -> Scene:
    """Sample a scene for the VAE, half of the time with content outside the captions."""
    wide = rng.random() < 0.5
    shapes = SHAPES + EXTRA_SHAPES if wide else SHAPES
    motions = MOTIONS + EXTRA_MOTIONS if wide else MOTIONS
    colours = list(COLOURS.values()) + (list(EXTRA_COLOURS.values()) if wide else [])
    ground = list(BACKGROUNDS.values())[rng.integers(3)]
    colour = colours[rng.integers(len(colours))]
    if rng.random() < 0.1:
        ground = tuple(int(v) for v in rng.integers(0, 256, 3))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
    motion = motions[rng.integers(len(motions))]
    middle = (float(rng.uniform(18, WIDTH - 18)), float(rng.uniform(15, HEIGHT - 15)))
    radius = float(rng.uniform(6, 13)) if wide else float(rng.uniform(*RADIUS_RANGE))
    path = motion_path(motion, middle, float(rng.uniform(8, 26)), frames)
    return Scene(
        shape=shapes[rng.integers(len(shapes))], colour=colour, background=ground, radius=radius, path=path
    )
