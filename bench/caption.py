"""Captioning: frames per second and peak memory at batch 1 and 8, with reading measured separately.

script/bench caption [--clips 32] [--size 640x480] [--frames 49] [--rounds 3] [--full-size]

COGVIDEOX_MODEL chooses the model, by default the embedded one. --full-size uses random weights in the
released model's shape instead, to measure a GPU without the download.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lib.caption.captioner import Captioner, sample_clip
from lib.caption.config import CaptionConfig
from lib.caption.model import CaptionModel
from lib.caption.request import CaptionSettings
from lib.predictors.caption import load_for_this_machine
from lib.predictors.model import resolve_model
from lib.video.reader import open_video
from lib.video.writer import write_video
from tiny import world
from tiny.captioner import build_caption_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("reading", "1", "8")
NEW_TOKENS = 64
"""Tokens generated for every clip: the random model never emits an end token."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench caption", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        render_clips(Path(folder), options)
        rounds = [{part: run(part, folder) for part in PARTS} for _ in range(options.rounds)]
    print(f"{options.clips} clips of {options.size}, {options.frames} frames; {rounds[0]['1']['model']}")
    for part in PARTS:
        label = "reading and scaling" if part == "reading" else f"the model, batch {part}"
        speed = statistics.median(each[part]["frames_per_second"] for each in rounds)
        memory = max(each[part]["peak_bytes"] for each in rounds) / 1e6
        print(f"{label:22} {speed:8.1f} frames/s, peak {memory:7.0f} MB")
    for name, what in (("frames_per_second", "frames/s"), ("peak_bytes", "peak memory")):
        ratios = [each["8"][name] / each["1"][name] for each in rounds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"batch 8 over batch 1, {what}: {statistics.median(ratios):.2f} ({spread})")


def render_clips(folder: Path, options: argparse.Namespace) -> None:
    """Render clips of the tiny world at a given size."""
    width, height = (int(side) for side in options.size.split("x"))
    rng = np.random.default_rng(0)
    for index in range(options.clips):
        attributes = world.ALL_COMBINATIONS[7 * index % len(world.ALL_COMBINATIONS)]
        scene = world.sample_scene(attributes, rng, frames=options.frames)
        frames = world.render(scene, height, width)
        write_video(frames, folder / f"{index:04d}.mp4", fps=8, format="mp4", metadata={})


def run(part: str, folder: str) -> dict:
    """Run one part in a process of its own, to measure its peak memory."""
    command = [
        sys.executable, "-P", "-m", "bench.caption", *sys.argv[1:], "--part", part, "--folder", folder
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict:
    """Return frames per second over all clips but the first, and peak memory (of the GPU if there is one)."""
    paths = sorted(options.folder.glob("*.mp4"))
    if options.part == "reading":
        started, frames = time.perf_counter(), 0
        for path in paths:
            with open_video(path) as video:
                frames += len(sample_clip(video, sampling="uniform", size=224).pixel_values)
        return _figures("no model", frames, time.perf_counter() - started)
    captioner, title = full_size() if options.full_size else configured()
    settings = CaptionSettings(frame_sampling="uniform", max_new_tokens=NEW_TOKENS)
    clips = []
    for path in paths:
        with open_video(path) as video:
            clips.append(captioner.sample(video, settings))
    captioner.caption(clips[:1], settings)
    started, batch = time.perf_counter(), int(options.part)
    for first in range(0, len(clips), batch):
        captioner.caption(clips[first : first + batch], settings)
    seconds = time.perf_counter() - started
    return _figures(title, sum(len(clip.pixel_values) for clip in clips), seconds)


def configured() -> tuple[Captioner, str]:
    """Load the captioner that COGVIDEOX_MODEL names."""
    model = resolve_model("caption")
    captioner, precision = load_for_this_machine(model)
    return captioner, f"{model.title} on {precision}"


def full_size() -> tuple[Captioner, str]:
    """Build the released shape with random weights, in bfloat16, and a tokenizer of a few words."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = CaptionModel(CaptionConfig()).to(torch.bfloat16).requires_grad_(False).eval()
    model = model.to_empty(device=device)
    for name, tensor in model.state_dict().items():
        if name.endswith("inv_freq"):
            steps = torch.arange(0, 128, 2, device=device) / 128
            tensor.copy_(500_000.0**-steps)
        elif tensor.ndim == 1:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            tensor.normal_(std=0.02)
    return Captioner(model, build_caption_tokenizer()), f"random weights of the released shape on {device}"


def _figures(title: str, frames: int, seconds: float) -> dict:
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    return {"model": title, "frames_per_second": frames / seconds, "peak_bytes": peak}


if __name__ == "__main__":
    main()
