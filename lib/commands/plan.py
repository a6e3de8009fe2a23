"""Print the memory plan of each checkpoint on cards of the usual sizes.

script/plan                                      the table of docs/memory.md
script/plan --model cogvideox-5b --card 24       one card, stage by stage
script/plan --json

No model is loaded and no GPU is needed: the numbers come from the memory model.
"""

import argparse
import json
import math
import sys
from typing import Any

from lib.commands.common import run_command
from lib.memory.model import GIB, OFFLOADS, Weights, released, usual_clip
from lib.memory.table import CARDS, markdown, plan_on_card, rows


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    return run_command(_plan, arguments)


def _plan(arguments: list[str]) -> int:
    names = [spec.name for task in ("t2v", "i2v") for spec in released(task)]
    parser = argparse.ArgumentParser(
        prog="script/plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=names, help="only this checkpoint, stage by stage")
    parser.add_argument("--card", type=float, help=f"memory in GB; by default {', '.join(map(str, CARDS))}")
    parser.add_argument("--weights", choices=("none", "int8", "fp8"), default="none", help="quantization")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.card is not None and not 0 < options.card < math.inf:
        parser.error(f"argument --card: {options.card:g} is not a size in GB above 0")
    if options.model is None:
        if options.card is not None or options.weights != "none":
            parser.error("--card and --weights need --model; the table has all cards")
        found = rows()
        print(json.dumps(found, indent=1) if options.json else markdown(found))
        return 0
    cards = [options.card] if options.card else list(CARDS)
    found = [_stages(options.model, card, options.weights) for card in cards]
    print(json.dumps(found, indent=1) if options.json else "\n\n".join(map(_text, found)))
    return 0


def _stages(name: str, card: float, weights: Weights) -> dict[str, Any]:
    plan = plan_on_card(name, card, weights)
    if plan is None:
        return {"model": name, "card": card, "plan": None}
    clip = usual_clip(plan.spec, frames=plan.frames)
    peaks = {
        offload: {
            stage: round(size / GIB, 2)
            for stage, size in plan.memory.peaks(clip, offload, tiled=plan.tiling).items()
        }
        for offload in OFFLOADS
    }
    return {"model": name, "card": card, "plan": str(plan), "chosen": plan.offload, "stages": peaks}


def _text(found: dict[str, Any]) -> str:
    head = f"{found['model']} on {found['card']:g} GB: {found['plan'] or 'does not fit'}"
    if not found["plan"]:
        return head
    stages = list(next(iter(found["stages"].values())))
    lines = [head, f"{'GiB':12}" + "".join(f"{stage:>16}" for stage in stages)]
    for offload, peaks in found["stages"].items():
        prefix = "*" if offload == found["chosen"] else " "
        lines.append(f"{prefix}{offload:11}" + "".join(f"{size:16.1f}" for size in peaks.values()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
