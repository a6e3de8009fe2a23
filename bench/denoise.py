"""Denoising and the stages around it, by variant, compared with plain diffusers in one process.

    script/bench denoise [--task t2v|i2v] [--rounds 7] [--steps 50] [--json FILE]

Uses the embedded model on this machine's device. `plain` is diffusers' own pipeline; the others are the
service's: at each speed, without guidance, and for a repeated prompt. Every round makes one clip of each.
Prints medians over rounds; a ratio is the median of the ratios of each round.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

from bench._arguments import at_least_one
from bench._levels import markdown
from lib.generation.generator import Generator
from lib.generation.request import build_request
from lib.models.specs import SPECS
from tiny.captions import canonical_caption
from tiny.evaluate import DEFAULTS, load_generator
from tiny.world import ALL_COMBINATIONS, render, sample_scene

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("text_encoding", "denoising", "decoding")
VARIANTS = {
    "plain": {},
    "exact": {},
    "exact, repeated prompt": {},
    "exact, guidance 1": {"guidance_scale": 1.0},
    "balanced": {"speed": "balanced"},
    "fast": {"speed": "fast"},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench denoise", description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=["t2v", "i2v"], default="t2v")
    parser.add_argument("--rounds", type=at_least_one, default=7)
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    rows = measure(options.task, options.rounds, options.steps)
    lines = []
    for name, rounds in rows.items():
        cells = [name]
        for stage in STAGES:
            seconds = statistics.median(each[stage] for each in rounds)
            ratios = [each[stage] / plain[stage] for each, plain in zip(rounds, rows["plain"], strict=True)]
            cells.append(f"{1000 * seconds:.1f} ms, {statistics.median(ratios):.2f}")
        lines.append(cells)
    print(f"tiny-{options.task}, {options.steps} steps, {options.rounds} rounds; ratios are to plain\n")
    print(markdown(("variant", *(stage.replace("_", " ") for stage in STAGES)), lines))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def measure(task: str, rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Return the seconds of each stage, by variant and round."""
    spec = SPECS[f"tiny-{task}"]
    service = load_generator(ROOT / "weights" / spec.name)
    pipeline, rng = plain_pipeline(task), np.random.default_rng(0)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for turn in range(rounds + 1):
        for name, settings in VARIANTS.items():
            repeated = "repeated" in name
            combination = ALL_COMBINATIONS[0 if repeated else 1 + turn * len(VARIANTS) % 200]
            asked = {
                "prompt": canonical_caption(combination) + ("" if repeated else f" {turn} {name}"),
                "seed": turn,
                "num_inference_steps": steps,
            }
            if task == "i2v":
                asked["image"] = Image.fromarray(render(sample_scene(combination, rng, from_start=True))[0])
            # A new generator for each plain clip, so that no prompt is cached.
            plain = Generator(spec=spec, pipeline=pipeline, report=lambda line: None)
            generator = plain if name == "plain" else service
            generator.frames(build_request(spec, **DEFAULTS | asked | settings))
            if turn:  # the first round warms up and encodes the repeated prompt
                rows[name].append(dict(generator.timings))
    return rows


def plain_pipeline(task: str):
    import diffusers
    import torch

    spec = SPECS[f"tiny-{task}"]
    pipeline = getattr(diffusers, spec.pipeline_class).from_pretrained(
        ROOT / "weights" / spec.name, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    main()
