"""The table of speed levels: how well each follows the prompt, how far it is from exact, what it saves."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench._distance import distances
from lib.generation.generator import Generator
from lib.generation.step_schedule import SPEEDS, Speed, steps_to_forecast
from lib.models.specs import SPECS, Task
from tiny.evaluate import Result, evaluate

COLUMNS = ("computed", "all four right", "PSNR", "SSIM", "perceptual", "denoising time")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A row of the table: a level, and the number of steps."""

    speed: Speed
    steps: int

    def __str__(self) -> str:
        return f"{self.speed}, {self.steps} steps"


@dataclass(slots=True)
class Row:
    """Results of a variant, clip by clip."""

    results: list[Result] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Denoising time, as a share of the reference's for the same clip."""
    distances: list[dict[str, float]] = field(default_factory=list)


def compare(
    generator: Generator, task: Task, variants: list[Variant], **settings: object
) -> dict[Variant, Row]:
    """Make the same clips with all variants in turn, and compare them with the first, which is exact."""
    rows = {variant: Row() for variant in variants}
    clips = [
        _timed(
            generator,
            evaluate(generator, task, **settings, speed=v.speed, num_inference_steps=v.steps),
        )
        for v in variants
    ]
    for together in zip(*clips, strict=True):
        reference, seconds = together[0]
        for variant, (result, taken) in zip(variants, together, strict=True):
            row = rows[variant]
            row.results.append(result)
            row.seconds.append(taken / seconds)
            if variant != variants[0]:
                row.distances.append(distances(result.frames, reference.frames, generator.pipeline.vae))
    return rows


def cells(generator: Generator, variant: Variant, row: Row) -> dict[str, str]:
    """Return the row's figures by COLUMNS: means over clips, and the median of the time."""
    forecast = steps_to_forecast(generator.spec, variant.speed, variant.steps)
    right = np.mean([all(result.agreement.values()) for result in row.results])
    found = {"computed": str(variant.steps - len(forecast)), "all four right": f"{100 * right:.1f}%"}
    if row.distances:
        mean = {name: np.mean([each[name] for each in row.distances]) for name in row.distances[0]}
        found |= {"PSNR": f"{mean['PSNR']:.1f} dB", "SSIM": f"{mean['SSIM']:.3f}"}
        found |= {"perceptual": f"{mean['perceptual']:.4f}"}
    else:
        found |= dict.fromkeys(("PSNR", "SSIM", "perceptual"), "")
    return found | {"denoising time": f"{statistics.median(row.seconds):.2f}"}


def step_schedules() -> str:
    """Return a table of the steps that every video model computes at each level."""
    lines = []
    for spec in SPECS.values():
        if spec.task != "caption":
            own = spec.num_inference_steps
            counts = [own - len(steps_to_forecast(spec, speed, own)) for speed in SPEEDS]
            lines.append([f"`{spec.name}`", str(own), *map(str, counts)])
    return markdown(("model", "steps", *SPEEDS), lines)


def markdown(header: tuple[str, ...], lines: list[list[str]]) -> str:
    """Return a table for the docs."""
    rows = [list(header), ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def replace_table(path: Path, name: str, table: str) -> None:
    """Replace what stands between the lines `<!-- table NAME -->` and `<!-- end -->` of a page."""
    before, begin, rest = path.read_text().partition(f"<!-- table {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise ValueError(f"{path} has no table {name}")
    path.write_text(before + begin + table + end + after)


def _timed(generator: Generator, results: Iterator[Result]) -> Iterator[tuple[Result, float]]:
    for result in results:
        yield result, generator.timings["denoising"]
