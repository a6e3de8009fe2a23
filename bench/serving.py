"""Cold start and warm requests of the service, compared with a plain diffusers script in one run.

    script/bench serving [--pairs 7] [--steps 50] [--speed exact,balanced,fast] [--json FILE]

Each pair starts both in turn, in alternating order, and times from the start of the process to the first
finished video, then one request for each speed, each with a new prompt and seed. The service is timed as
users see it: server start, schema, HTTP, mp4 in the reply; its first video is an exact one. The comparison is
bench/seed_style.py, which has no speed levels, with the same requests, weights, threads, dtype, size and
steps. Prints medians over the pairs; a ratio is the median of the ratios of each pair.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench._arguments import at_least_one
from bench._levels import markdown
from lib.generation.step_schedule import SPEEDS
from lib.serving.client import predict
from lib.serving.server import Server
from tiny.captions import canonical_caption
from tiny.world import ALL_COMBINATIONS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "weights" / "tiny-t2v"
SAME_FOR_BOTH = {"COGVIDEOX_MODEL": "", "CUDA_VISIBLE_DEVICES": ""}  # embedded weights, CPU, fp32
COLD = "cold start to first video"


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench serving", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=at_least_one, default=7)
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--speed", default=",".join(SPEEDS), help="of the warm requests, with commas between")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    speeds = options.speed.split(",")
    if unknown := set(speeds) - set(SPEEDS):
        parser.error(f"--speed {', '.join(unknown)} is unknown; there are: {', '.join(SPEEDS)}")
    time_seed_style(_requests(0, options.steps, ["exact"]))  # fills the disk cache for both
    run = {"service": time_service, "seed style": time_seed_style}
    rows: dict[str, list[list[float]]] = {name: [] for name in run}
    for pair in range(options.pairs):
        requests = _requests(pair, options.steps, ["exact", *speeds])
        for name in list(run) if pair % 2 == 0 else reversed(run):
            rows[name].append(run[name](requests))
        shown = (f"{name} {' '.join(f'{seconds:.2f}' for seconds in rows[name][-1])} s" for name in rows)
        print(f"pair {pair + 1}, cold and warm: {', '.join(shown)}", file=sys.stderr, flush=True)
    labels = [COLD, *(f"warm request, {speed}" for speed in speeds)]
    print(markdown(("", "service", "seed style", "ratio", "of the pairs"), summary(labels, rows)))
    if options.json:
        figures = {
            name: [dict(zip(labels, row, strict=True)) for row in timed] for name, timed in rows.items()
        }
        options.json.write_text(json.dumps({"steps": options.steps, **figures}, indent=1) + "\n")


def summary(labels: list[str], rows: dict[str, list[list[float]]]) -> list[list[str]]:
    """Return a line of the table for each label; `rows` are seconds by name, pair and label."""
    lines = []
    for index, label in enumerate(labels):
        service, seed = ([row[index] for row in rows[name]] for name in ("service", "seed style"))
        ratios = [ours / theirs for ours, theirs in zip(service, seed, strict=True)]
        medians = [f"{statistics.median(seconds):.2f} s" for seconds in (service, seed)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append([label, *medians, f"{statistics.median(ratios):.2f}", spread])
    return lines


def time_service(requests: list[dict]) -> list[float]:
    """Return the seconds from start to the first video, and of each further request."""
    started = time.perf_counter()
    with Server("t2v", on_log=lambda line: None, environment=SAME_FOR_BOTH) as server:
        seconds = []
        for request in requests:
            start = time.perf_counter() if seconds else started
            predict(server.url, request)
            seconds.append(time.perf_counter() - start)
    return seconds


def time_seed_style(requests: list[dict]) -> list[float]:
    """Return the same figures for the plain script."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "bench" / "seed_style.py"), str(FOLDER), f"{folder}/video.mp4"]
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=os.environ | SAME_FOR_BOTH,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with process:
            process.stdout.readline()
            seconds = []
            for request in requests:
                start = time.perf_counter() if seconds else started
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                if not process.stdout.readline():
                    raise RuntimeError("bench/seed_style.py ended early; run it by hand to see why")
                seconds.append(time.perf_counter() - start)
            process.stdin.close()
    return seconds


def _requests(pair: int, steps: int, speeds: list[str]) -> list[dict]:
    """Return a request for each speed, with a prompt and seed that no other pair has."""
    numbers = [len(speeds) * pair + turn for turn in range(len(speeds))]
    return [
        {
            "prompt": canonical_caption(ALL_COMBINATIONS[number * 29 % len(ALL_COMBINATIONS)]),
            "seed": 1000 + number,
            "num_inference_steps": steps,
            "guidance_scale": 6.0,
            "speed": speed,
        }
        for number, speed in zip(numbers, speeds, strict=True)
    ]


if __name__ == "__main__":
    main()
