"""How often clips of the embedded models match their prompts, measured by the judge."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.models.derive import spec_for
from lib.models.specs import Task
from lib.pipelines.load import load_pipeline
from lib.pipelines.machine import inspect_machine
from tiny import world
from tiny.captions import sample_caption
from tiny.judge import ATTRIBUTE_NAMES, Verdict, first_frame_psnr, judge

DEFAULTS = {
    "negative_prompt": "",
    "num_inference_steps": 50,
    "guidance_scale": 6.0,
    "num_frames": None,
    "width": None,
    "height": None,
    "fps": None,
    "use_dynamic_cfg": False,
    "scheduler": "default",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A generated clip and what was requested."""

    asked: world.Attributes
    prompt: str
    verdict: Verdict
    frames: np.ndarray
    psnr: float | None
    """PSNR of the first frame to the given image, in dB; image-to-video only."""

    @property
    def agreement(self) -> dict[str, bool]:
        return self.verdict.agreement(self.asked)


def load_generator(folder: Path) -> Generator:
    """Load a generator for a diffusers folder, without progress reports."""
    spec = spec_for(folder.name, folder)
    pipeline = load_pipeline(spec, folder, inspect_machine(spec))
    return Generator(spec=spec, pipeline=pipeline, report=lambda line: None)


def evaluate(
    generator: Generator, task: Task, *, trained: int, held_out: int, seed: int = 1, **settings: object
) -> Iterator[Result]:
    """Generate clips for prompts of trained and of held-out combinations."""
    rng = np.random.default_rng(seed)
    for pool, count in ((world.TRAINED_COMBINATIONS, trained), (world.HELD_OUT_COMBINATIONS, held_out)):
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(count // len(pool) + 1)])
        for index in order[:count]:
            asked, image = pool[index], None
            prompt = sample_caption(asked, rng, variety=0.5)
            if task == "i2v":
                first = world.render(world.sample_scene(asked, rng, from_start=True))[0]
                image = Image.fromarray(first)
            request = build_request(
                generator.spec,
                prompt=prompt,
                seed=int(rng.integers(2**31)),
                image=image,
                **(DEFAULTS | settings),
            )
            frames = generator.frames(request)
            yield Result(
                asked=asked,
                prompt=prompt,
                verdict=judge(frames),
                frames=frames,
                psnr=first_frame_psnr(frames, first) if image is not None else None,
            )


def summarise(results: list[Result]) -> dict[str, float]:
    """Return the shares in 0..1 of clips with each attribute, and all four, correct; the mean PSNR in dB."""
    rights = [result.agreement for result in results]
    summary = {name: float(np.mean([r[name] for r in rights])) for name in ATTRIBUTE_NAMES}
    summary["all four"] = float(np.mean([all(r.values()) for r in rights]))
    if results[0].psnr is not None:
        summary["psnr"] = float(np.mean([r.psnr for r in results]))
    return summary


def contact_sheet(results: list[Result], path: Path, *, every: int = 2, scale: int = 2) -> None:
    """Write a PNG with one clip per row, every other frame."""
    rows = [np.concatenate(list(result.frames[::every]), axis=1) for result in results]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)
