"""One clip by 1, 2, 4, ... processes in one run: seconds per step, and how many times faster.

    script/bench parallel [--processes 1,2,4] [--steps 10] [--guidance 6] [--json PATH]

On a machine with several GPUs there is a process for each; on a CPU they share its cores, so the figures
there only show that it works. COGVIDEOX_MODEL chooses the model (empty: the embedded one). Each number of
processes has a server of its own; the first request, which may compile, is not counted.
"""

import argparse
import json
import statistics
from pathlib import Path

from bench._arguments import at_least_one
from lib.distributed.layout import VARIABLE
from lib.serving.client import predict
from lib.serving.server import Server

PROMPT = "a red circle moves right on a black background"


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench parallel", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", default=",".join(map(str, _default())))
    parser.add_argument("--steps", type=at_least_one, default=10)
    parser.add_argument(
        "--requests", type=at_least_one, default=3, help="counted for each; the median is shown"
    )
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--json", type=Path, help="where the figures go too")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    print(f"{'processes':>9}  {'shared by':<16} {'s per step':>10}  {'times faster':>12}", flush=True)
    for count in map(int, options.processes.split(",")):
        row = measure(count, steps=options.steps, requests=options.requests, guidance=options.guidance)
        row["speedup"] = round(rows[0]["step_seconds"] / row["step_seconds"], 2) if rows else 1.0
        rows.append(row)
        print(
            f"{count:>9}  {row['layout']:<16} {row['step_seconds']:>10.3f}  {row['speedup']:>12.2f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(count: int, *, steps: int, requests: int, guidance: float) -> dict[str, object]:
    """Measure the denoising of one clip by a number of processes."""
    inputs = {"prompt": PROMPT, "num_inference_steps": steps, "guidance_scale": guidance}
    setting = {VARIABLE: "off" if count == 1 else str(count)}
    with Server("t2v", on_log=lambda line: None, environment=setting) as server:
        metrics = [predict(server.url, inputs | {"seed": seed})["metrics"] for seed in range(requests + 1)][
            1:
        ]
    seconds = statistics.median(each["denoising_seconds"] for each in metrics)
    layout = metrics[0].get("parallel", "one")
    return {"processes": count, "layout": layout, "step_seconds": round(seconds / steps, 4)}


def _default() -> list[int]:
    """Return 1, 2, 4, ... up to the number of GPUs; 1 and 2 on a CPU."""
    import torch

    most = torch.cuda.device_count() or 2
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


if __name__ == "__main__":
    main()
