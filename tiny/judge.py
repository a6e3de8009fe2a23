"""Recognizing shape, colour, background and motion in decoded frames, without knowing the prompt."""

from dataclasses import dataclass

import numpy as np

from tiny.world import (
    BACKGROUNDS,
    COLOURS,
    EXTRA_COLOURS,
    EXTRA_SHAPES,
    SHAPES,
    Attributes,
    coverage,
)

# Intersection over union with the best template, averaged over the frames.
COHERENT_OVERLAP = 0.45  # below it there is no object, and so no colour and motion
SHAPE_OVERLAP = 0.65  # below it the object has none of the shapes
MIN_TRAVEL = 5.0  # pixels of a 64 pixel wide frame, from the first to the last frame
MAX_STRAY = 2.0  # pixels, root mean square distance of the centres from a steady motion


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the frames show; None where that is unclear."""

    shape: str | None
    colour: str | None
    background: str | None
    motion: str | None
    overlap: float

    def agreement(self, asked: Attributes) -> dict[str, bool]:
        """Return, for each attribute, whether it is as requested."""
        return {name: getattr(self, name) == getattr(asked, name) for name in ATTRIBUTE_NAMES}


ATTRIBUTE_NAMES = ("colour", "background", "motion", "shape")


def judge(frames: np.ndarray, *, extra: bool = False) -> Verdict:
    """Judge a clip: uint8 [frames, height, width, 3] of any size.

    With `extra`, also what no caption names: star, ring; magenta, cyan, orange; circling, zigzag.
    """
    clip = frames.astype(np.float64)
    ground = _ground(clip)
    colour = _foreground(clip, ground)
    background = _nearest(ground, BACKGROUNDS, 60)
    if colour is None:
        return Verdict(shape=None, colour=None, background=background, motion=None, overlap=0.0)
    alpha = np.clip((clip - ground) @ (colour - ground) / ((colour - ground) @ (colour - ground)), 0, 1)
    shapes = SHAPES + EXTRA_SHAPES if extra else SHAPES
    shape, overlap = _shape(alpha, shapes)
    if overlap < COHERENT_OVERLAP:
        return Verdict(shape=None, colour=None, background=None, motion=None, overlap=overlap)
    palette = COLOURS | EXTRA_COLOURS if extra else COLOURS
    return Verdict(
        shape=shape if overlap >= SHAPE_OVERLAP else None,
        colour=_nearest(colour, palette, 110),
        background=background,
        motion=_motion(alpha, extra=extra),
        overlap=overlap,
    )


def first_frame_psnr(frames: np.ndarray, image: np.ndarray) -> float:
    """Return the PSNR in dB of the first frame and an image, both uint8 [height, width, 3]."""
    error = np.mean((frames[0].astype(np.float64) - image.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / max(error, 1e-10)))


def _ground(clip: np.ndarray) -> np.ndarray:
    border = np.concatenate(
        [clip[:, :2].reshape(-1, 3), clip[:, -2:].reshape(-1, 3), clip[:, :, :2].reshape(-1, 3),
         clip[:, :, -2:].reshape(-1, 3)]
    )  # fmt: skip
    return np.median(border, axis=0)


def _foreground(clip: np.ndarray, ground: np.ndarray) -> np.ndarray | None:
    distance = np.linalg.norm(clip - ground, axis=-1)
    strong = distance > max(60.0, 0.6 * np.percentile(distance, 99))
    if strong.sum() < 0.01 * distance.size:
        return None
    return np.median(clip[strong], axis=0)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= limit else None


def _centres(alpha: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[0 : alpha.shape[1], 0 : alpha.shape[2]]
    solid = np.where(alpha > 0.35, alpha, 0.0)
    mass = solid.sum((1, 2)) + 1e-9
    return np.stack([(solid * x).sum((1, 2)) / mass, (solid * y).sum((1, 2)) / mass], axis=1)


def _shape(alpha: np.ndarray, shapes: tuple[str, ...]) -> tuple[str, float]:
    """Return the best template by mean IoU, each fitted to the centre and area in a frame."""
    height, width = alpha.shape[1:]
    scores = dict.fromkeys(shapes, 0.0)
    for frame, centre in zip(alpha, _centres(alpha), strict=True):
        area = frame[frame > 0.35].sum()
        for shape in shapes:
            unit = coverage(shape, (32.0, 32.0), 20.0, 64, 64)
            radius = 20.0 * np.sqrt(area / unit.sum())
            offset = _centroid_offset(unit) * radius / 20.0
            template = coverage(shape, tuple(centre - offset), radius, height, width)
            overlap = np.minimum(frame, template).sum() / max(np.maximum(frame, template).sum(), 1e-9)
            scores[shape] += overlap / len(alpha)
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


def _centroid_offset(unit: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[0:64, 0:64]
    return np.array([(unit * x).sum(), (unit * y).sum()]) / unit.sum() - 32.0


def _motion(alpha: np.ndarray, *, extra: bool) -> str | None:
    centres = _centres(alpha) * 64.0 / alpha.shape[2]
    if len(centres) < 2:
        return "still"
    time = np.linspace(-0.5, 0.5, len(centres))
    middle = centres.mean(0)
    travel = (time[:, None] * (centres - middle)).sum(0) / (time**2).sum()
    stray = np.sqrt(((centres - middle - time[:, None] * travel) ** 2).sum(1).mean())
    if stray > MAX_STRAY:
        return _bent_motion(centres - middle, time[:, None] * travel) if extra else None
    across, along = sorted(np.abs(travel))
    if along < MIN_TRAVEL:
        return "still"
    if along < 2 * across:
        return None
    horizontal = abs(travel[0]) > abs(travel[1])
    return ("left", "right")[int(travel[0] > 0)] if horizontal else ("up", "down")[int(travel[1] > 0)]


def _bent_motion(path: np.ndarray, straight: np.ndarray) -> str | None:
    """Return circling or zigzag for a path [frames, 2] about its middle and the line fitted to it."""
    radii = np.linalg.norm(path, axis=1)
    turned = np.ptp(np.unwrap(np.arctan2(path[:, 1], path[:, 0])))
    if radii.std() < 0.35 * radii.mean() and turned > 1.4 * np.pi:
        return "circling"
    off_line = path - straight
    swing = off_line[:, np.argmax(np.ptp(off_line, axis=0))]
    turns = np.sum(np.diff(np.sign(np.diff(swing))) != 0)
    return "zigzag" if turns >= 2 and np.linalg.norm(straight[-1] - straight[0]) >= MIN_TRAVEL else None
