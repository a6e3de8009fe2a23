"""How often captions match the content of clips."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.caption.captioner import Captioner
from lib.caption.request import CaptionSettings
from lib.video.reader import open_video
from lib.video.writer import write_video
from tiny import world
from tiny.judge import ATTRIBUTE_NAMES
from tiny.world import Attributes

SIZES = (
    (48, 64),
    (72, 96),
    (96, 128),
    (120, 160),
    (144, 192),
    (180, 320),
    (240, 240),
    (270, 480),
    (480, 640),
)
RATES = (6, 8, 10, 12, 15, 24, 25, 30)
SECONDS = (0.6, 4.0)
BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """The caption of a clip and what the clip shows."""

    asked: Attributes
    text: str

    @property
    def agreement(self) -> dict[str, bool]:
        """Return, for each attribute, whether the caption names its value and no other."""
        return agreement(self.text, self.asked)


def agreement(text: str, asked: Attributes) -> dict[str, bool]:
    """Return, for each attribute, whether a text names its value and no other ("motionless" is still)."""
    words = set(re.findall(r"[a-z]+", text.lower().replace("grey", "gray").replace("motionless", "still")))
    values = {
        "shape": world.SHAPES,
        "colour": tuple(world.COLOURS),
        "background": tuple(world.BACKGROUNDS),
        "motion": world.MOTIONS,
    }
    return {name: words & set(values[name]) == {getattr(asked, name)} for name in ATTRIBUTE_NAMES}


def write_rendered_clips(folder: Path, count: int, *, seed: int) -> list[tuple[Path, Attributes]]:
    """Write clips of many sizes, rates and lengths, every third of a held-out combination."""
    rng, clips = np.random.default_rng((seed, 77)), []
    for index in range(count):
        pool = world.HELD_OUT_COMBINATIONS if index % 3 == 0 else world.TRAINED_COMBINATIONS
        attributes = pool[rng.integers(len(pool))]
        height, width = SIZES[rng.integers(len(SIZES))]
        fps = RATES[rng.integers(len(RATES))]
        frames = max(5, round(fps * rng.uniform(*SECONDS)))
        scene = world.sample_scene(attributes, rng, frames=frames)
        path = folder / f"{index:04d}.mp4"
        write_video(world.render(scene, height, width), path, fps=fps, format="mp4", metadata={})
        clips.append((path, attributes))
    return clips


def describe(
    captioner: Captioner, clips: list[tuple[Path, Attributes]], **settings: object
) -> list[Described]:
    """Caption files in batches."""
    asked = CaptionSettings(max_new_tokens=40, **settings)
    found = []
    for start in range(0, len(clips), BATCH):
        batch = clips[start : start + BATCH]
        samples = []
        for path, _ in batch:
            with open_video(path) as video:
                samples.append(captioner.sample(video, asked))
        captions = captioner.caption(samples, asked)
        found += [
            Described(asked=attributes, text=caption.text)
            for (_, attributes), caption in zip(batch, captions, strict=True)
        ]
    return found


def summarise(results: list[dict[str, bool]]) -> dict[str, float]:
    """Return the shares in 0..1 in which each attribute, and all four, agree."""
    summary = {name: float(np.mean([each[name] for each in results])) for name in ATTRIBUTE_NAMES}
    return summary | {"all four": float(np.mean([all(each.values()) for each in results]))}
