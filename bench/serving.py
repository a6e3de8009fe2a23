"""Cold start and warm requests of the service beside a plain diffusers script, in one run.

    script/bench serving [--pairs 7] [--steps 50]

Each pair starts both (in turn, the order alternating), times from the start of the process to the first
finished video, then one more request with a new prompt and seed. The service is timed as its users meet it:
server start, schema, HTTP, mp4 in the reply. The comparison is bench/seed_style.py on the same weights with
the same threads, dtype, size and steps.
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

from lib.serving.client import predict
from lib.serving.server import Server
from tiny.captions import canonical_caption
from tiny.world import ALL_COMBINATIONS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "weights" / "tiny-t2v"
SAME_FOR_BOTH = {"COGVIDEOX_MODEL": "", "CUDA_VISIBLE_DEVICES": ""}  # embedded weights, CPU, fp32


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench serving", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {"service": [], "seed style": []}
    run = {"service": time_service, "seed style": time_seed_style}
    time_seed_style(_requests(0, options.steps))  # fills the disk cache for both
    for pair in range(options.pairs):
        names = list(rows) if pair % 2 == 0 else list(reversed(rows))
        for name in names:
            rows[name].append(run[name](_requests(pair, options.steps)))
        shown = "   ".join(f"{name} {rows[name][-1][0]:.2f} s, {rows[name][-1][1]:.2f} s" for name in rows)
        print(f"pair {pair + 1}: cold, warm: {shown}", flush=True)
    for index, label in enumerate(("cold start to first video", "warm request")):
        medians = {name: statistics.median(row[index] for row in rows[name]) for name in rows}
        ratios = [a[index] / b[index] for a, b in zip(rows["service"], rows["seed style"], strict=True)]
        print(
            f"{label}: service {medians['service']:.2f} s, seed style {medians['seed style']:.2f} s, "
            f"ratio {statistics.median(ratios):.2f} (median of {len(ratios)} pairs, "
            f"{min(ratios):.2f} to {max(ratios):.2f})"
        )


def time_service(requests: list[dict]) -> tuple[float, float]:
    """Seconds from nothing to the first video, and of a second request."""
    started = time.perf_counter()
    with Server("t2v", on_log=lambda line: None, environment=SAME_FOR_BOTH) as server:
        predict(server.url, requests[0])
        cold = time.perf_counter() - started
        begun = time.perf_counter()
        predict(server.url, requests[1])
        return cold, time.perf_counter() - begun


def time_seed_style(requests: list[dict]) -> tuple[float, float]:
    """The same two figures of the plain script."""
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
                begun = time.perf_counter() if seconds else started
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                if not process.stdout.readline():
                    raise RuntimeError("bench/seed_style.py ended early; run it by hand to see why")
                seconds.append(time.perf_counter() - begun)
            process.stdin.close()
    return seconds[0], seconds[1]


def _requests(pair: int, steps: int) -> list[dict]:
    return [
        {
            "prompt": canonical_caption(ALL_COMBINATIONS[(2 * pair + turn) * 29 % len(ALL_COMBINATIONS)]),
            "seed": 1000 + 2 * pair + turn,
            "num_inference_steps": steps,
            "guidance_scale": 6.0,
        }
        for turn in range(2)
    ]


if __name__ == "__main__":
    main()
