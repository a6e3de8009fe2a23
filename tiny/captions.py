"""Captions of the synthetic world, from one canonical sentence to varied paraphrases."""

import numpy as np

from tiny.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Attributes

CANONICAL_MOVING = "a {colour} {shape} moves {motion} on a {background} background"
CANONICAL_STILL = "a {colour} {shape} stays still on a {background} background"

MOVING = (
    CANONICAL_MOVING,
    "a {colour} {shape} moves {motion} across a {background} background",
    "a {colour} {shape} moving {motion} on a {background} background",
    "a {colour} {shape} slides {motion} over a {background} background",
    "the {colour} {shape} glides {motion} on {background}",
    "on a {background} background a {colour} {shape} moves {motion}",
    "a {background} background with a {colour} {shape} moving {motion}",
    "{colour} {shape} moving {motion}, {background} background",
    "{colour} {shape}, {background} background, moves {motion}",
    "a {shape} that is {colour} moves {motion} on a {background} background",
    "there is a {colour} {shape} drifting {motion} in front of a {background} background",
    "video of a {colour} {shape} going {motion} on a plain {background} background",
    "a {colour} {shape} travels {direction} on a {background} background",
    "a {colour} {shape} moves {direction} against a {background} backdrop",
    "one {colour} {shape} is moving {direction} over a {background} ground",
)
STILL = (
    CANONICAL_STILL,
    "a {colour} {shape} stays in place on a {background} background",
    "a still {colour} {shape} on a {background} background",
    "a {colour} {shape} does not move on a {background} background",
    "the {colour} {shape} rests on {background}",
    "on a {background} background a {colour} {shape} stays still",
    "a {background} background with a motionless {colour} {shape}",
    "{colour} {shape} standing still, {background} background",
    "{colour} {shape}, {background} background, stays still",
    "a {shape} that is {colour} stands still on a {background} background",
    "there is a {colour} {shape} resting in front of a {background} background",
    "video of a motionless {colour} {shape} on a plain {background} background",
    "a {colour} {shape} remains still against a {background} backdrop",
)
DIRECTION_WORDS = {"left": "to the left", "right": "to the right", "up": "upwards", "down": "downwards"}
UNKNOWN_ADJECTIVES = ("small", "big", "bright", "vivid", "flat", "simple")  # stay outside the vocabulary
WORDS_OUTSIDE_TEMPLATES = ("grey", "upward", "downward", "video", "clip", "shows", "and", "it", "its", "with")


def canonical_caption(attributes: Attributes) -> str:
    """Return the simplest sentence that names all four attributes."""
    return _fill(CANONICAL_STILL if attributes.motion == "still" else CANONICAL_MOVING, attributes)


def sample_caption(attributes: Attributes, rng: np.random.Generator, variety: float = 1.0) -> str:
    """Sample a caption; with probability `variety` a paraphrase, with "grey", capitals and full stops."""
    if rng.random() >= variety:
        return canonical_caption(attributes)
    templates = STILL if attributes.motion == "still" else MOVING
    text = _fill(templates[rng.integers(len(templates))], attributes)
    if rng.random() < 0.15:
        adjective = UNKNOWN_ADJECTIVES[rng.integers(len(UNKNOWN_ADJECTIVES))]
        text = text.replace(attributes.colour, f"{adjective} {attributes.colour}")
    if rng.random() < 0.5:
        text = text.replace("gray", "grey")
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.3:
        text += "."
    return text


def vocabulary_words() -> list[str]:
    """Return all lower-case words of captions, sorted; punctuation is separate."""
    words = set(SHAPES) | set(COLOURS) | set(BACKGROUNDS) | set(MOTIONS) | set(WORDS_OUTSIDE_TEMPLATES)
    for template in (*MOVING, *STILL, *DIRECTION_WORDS.values()):
        words |= {w for w in template.replace(",", " ").split() if "{" not in w}
    return sorted(words)


def _fill(template: str, attributes: Attributes) -> str:
    return template.format(
        colour=attributes.colour,
        shape=attributes.shape,
        background=attributes.background,
        motion=attributes.motion,
        direction=DIRECTION_WORDS.get(attributes.motion, ""),
    )
