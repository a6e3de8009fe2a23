"""Peak memory of the trainer for few and for many clips, which must not depend on their number.

script/bench training-memory [--clips 20 200] [--frames 49] [--steps 20]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lib.video.writer import write_video
from tiny import world

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench training-memory", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    peaks = []
    for count in options.clips:
        with tempfile.TemporaryDirectory() as folder:
            render_clips(Path(folder) / "clips", count, options.frames)
            cold, warm = (peak_bytes(Path(folder), run, options.steps) for run in ("cold", "warm"))
        peaks.append(max(cold, warm))
        shown = f"{cold / 1e6:.0f} MB, with everything cached {warm / 1e6:.0f} MB"
        print(f"{count:5} clips of {options.frames} frames: {shown}", flush=True)
    print(f"largest over smallest: {max(peaks) / min(peaks):.3f}")


def render_clips(folder: Path, count: int, frames: int) -> None:
    """Render clips of the tiny world with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        attributes = world.ALL_COMBINATIONS[index % len(world.ALL_COMBINATIONS)]
        scene = world.sample_scene(attributes, rng, frames=frames)
        clip = folder / f"{index:04d}.mp4"
        write_video(world.render(scene), clip, fps=world.FPS, format="mp4", metadata={})
        clip.with_suffix(".txt").write_text(
            f"{attributes.colour} {attributes.shape} on {attributes.background}, {attributes.motion}"
        )


def peak_bytes(folder: Path, run: str, steps: int) -> int:
    """Return the peak memory of a complete training in a process of its own, with the processes it starts."""
    command = [
        sys.executable, "-P", "-m", "training", f"input_videos={folder}/clips", f"output_dir={folder}/{run}",
        f"max_train_steps={steps}", "rank=16", "seed=1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COGVIDEOX_CACHE": str(folder / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
