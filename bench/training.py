"""Training steps per second and peak memory, compared with a plain loop like CogVideo's own trainer.

    script/bench training [--pairs 3] [--steps 60] [--batch 1] [--clips 200] [--frames 49]
    script/bench training --gpu [--base-precision fp8] [--steps 10] [--layers 42]

The first form trains tiny-i2v on rendered clips, with both trainers in turn, each in a process of its own, on
the same base, clips, batch, rank and threads. The plain loop (bench/seed_style_training.py) runs as in
CogVideo's launch scripts, with gradient checkpointing, and once more without. The second form writes a model
of the shape of CogVideoX-5B-I2V with random weights (12 GB in the temporary folder) and trains it on 49
frames of 720x480 with rank 128 on this machine's GPU. With --try-out it does so with a small model on a CPU.
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "weights" / "tiny-i2v"
RANK = 128
STEP_FLOPS = 1.24e15
"""Floating-point operations of one step of that shape, with gradient checkpointing."""
WARM_UP = 3
SHAPE_CLIPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench training", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--layers", type=int, help="with --gpu: another number of them")
    parser.add_argument("--try-out", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--base-precision", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure_service(options, options.measure)
    if options.gpu or options.try_out:
        return measure_shape(options)
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run both trainers in turn and print the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        render_clips(clips, options.clips, options.frames)
        rows: dict[str, list[dict]] = {"service": [], "plain, as launched": [], "plain, no checkpointing": []}
        for pair in range(options.pairs):
            for name in rows if pair % 2 == 0 else reversed(rows):
                rows[name].append(run(name, options, Path(folder), clips))
            shown = (
                f"{n} {r[-1]['steps_per_second']:.2f} steps/s, {r[-1]['peak_bytes'] / 1e6:.0f} MB"
                for n, r in rows.items()
            )
            print(f"pair {pair + 1}: " + "; ".join(shown), flush=True)
    for other in list(rows)[1:]:
        for figure, text in (("steps_per_second", "steps a second"), ("peak_bytes", "peak memory")):
            ratios = [a[figure] / b[figure] for a, b in zip(rows["service"], rows[other], strict=True)]
            print(
                f"service / {other}: {text} {statistics.median(ratios):.2f} "
                f"(median of {len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
            )


def run(name: str, options: argparse.Namespace, folder: Path, clips: Path) -> dict:
    """Run one training in a process of its own and return what it printed."""
    sizes = [str(options.steps), str(options.batch)]
    if name == "service":
        command = [sys.executable, "-P", "-m", "bench.training", "--measure", str(clips)]
        command += ["--steps", sizes[0], "--batch", sizes[1], "--frames", str(options.frames)]
    else:
        plain = str(ROOT / "bench" / "seed_style_training.py")
        checkpointing = "1" if name == "plain, as launched" else "0"
        command = [sys.executable, plain, str(BASE), str(clips), str(options.frames), *sizes, str(RANK)]
        command += [checkpointing]
    settings = {"COGVIDEOX_CACHE": str(folder / "cache"), "COGVIDEOX_MODEL": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_service(options: argparse.Namespace, clips: Path) -> None:
    """Run the service's trainer in this process, from decoding to the last step."""
    seconds = seconds_per_step(clips, options, max_num_frames=options.frames)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"steps_per_second": 1 / seconds, "peak_bytes": peak}))


def seconds_per_step(
    clips: Path, options: argparse.Namespace, *, at_first_step: Callable[[], None] = lambda: None, **settings
) -> float:
    """Measure the service's trainer on the base that COGVIDEOX_MODEL names, after the first steps."""
    from training.config import TrainingConfig
    from training.trainer import train

    config = TrainingConfig.from_inputs(
        input_videos=str(clips),
        max_train_steps=options.steps + WARM_UP,
        train_batch_size=options.batch,
        rank=RANK,
        checkpointing_steps=10**6,
        seed=0,
        **settings,
    )
    moments: list[tuple[int, float]] = []

    def report(line: str) -> None:
        if line.startswith("progress: training "):
            if not moments:
                at_first_step()
            moments.append((int(line.split()[2].partition("/")[0]), time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", report=report)
    # At most one line a second is printed: if steps are quick, none ends exactly at the warm-up.
    first, began = [moment for moment in moments if moment[0] <= WARM_UP][-1]
    last, ended = moments[-1]
    return (ended - began) / (last - first)


def measure_shape(options: argparse.Namespace) -> None:
    """Measure seconds per step and peak memory of the trainer on random weights of the released shape."""
    import torch

    from bench._random_base import FIVE_B, SMALL, write_random_base

    shape, device = (SMALL, "cpu") if options.try_out else (FIVE_B, "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--gpu needs an NVIDIA GPU; torch finds none.")
    layers = options.layers or shape.transformer["num_layers"]
    shape = replace(shape, transformer=shape.transformer | {"num_layers": layers})
    ceiling = None if options.try_out else matmul_ceiling(device, torch.bfloat16)
    peaks: list[int] = []

    def take_peak() -> None:
        if device == "cuda":
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as folder:
        base = write_random_base(Path(folder) / "base", shape, device=device)
        clips = Path(folder) / "clips"
        render_clips(clips, SHAPE_CLIPS, shape.transformer["sample_frames"])
        os.environ |= {"COGVIDEOX_CACHE": str(Path(folder) / "cache"), "COGVIDEOX_MODEL": str(base)}
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_per_step(
            clips, options, at_first_step=take_peak, base_precision=options.base_precision
        )
        take_peak()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, a small shape"
    print(f"{name}, base {options.base_precision}, {layers} layers: {seconds:.2f} s a step", flush=True)
    if device == "cuda":
        flops = STEP_FLOPS * options.batch * layers / FIVE_B.transformer["num_layers"]
        print(f"{flops / seconds / ceiling:.0%} of the matmul ceiling of {ceiling / 1e12:.0f} TFLOP/s")
        before, after = (peak / 2**30 for peak in peaks)
        print(f"peak memory {after:.1f} GiB in the steps, {before:.1f} GiB up to the first one")


def matmul_ceiling(device: str, dtype: object) -> float:
    """Measure the FLOP/s of large matrix products on this device."""
    import torch

    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def render_clips(folder: Path, count: int, frames: int) -> None:
    """Render clips of the synthetic world with captions."""
    from lib.video.writer import write_video
    from tiny import world
    from tiny.captions import canonical_caption

    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        asked = world.ALL_COMBINATIONS[rng.integers(len(world.ALL_COMBINATIONS))]
        scene = world.sample_scene(asked, rng, from_start=True, frames=frames)
        write_video(world.render(scene), folder / f"{index:05d}.mp4", fps=8, format="mp4", metadata={})
        (folder / f"{index:05d}.txt").write_text(canonical_caption(asked))


if __name__ == "__main__":
    main()
