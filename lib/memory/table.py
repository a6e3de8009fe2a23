"""The table of plans: every released checkpoint on GPUs of the usual sizes."""

from collections.abc import Sequence

from lib.errors import UserError
from lib.memory.model import GIB, MemoryModel, Weights, released
from lib.memory.plan import MemoryPlan, choose_plan
from lib.pipelines.machine import Machine

CARDS = (6, 8, 12, 16, 24, 40, 48, 80, 141)
"""Sizes that cards are sold as; the vendors' GB are GiB."""
DRIVER_GIB = 0.7
"""Used on every card before the first tensor: CUDA's context and the driver."""


def plan_on_card(name: str, gigabytes: float, weights: Weights = "none") -> MemoryPlan | None:
    """Return the plan for a released checkpoint on an empty card, None when no clip fits."""
    spec = next(spec for task in ("t2v", "i2v") for spec in released(task) if spec.name == name)
    free = int((gigabytes - DRIVER_GIB) * GIB)
    machine = Machine(device="cuda", free_bytes=free, dtype=spec.dtype)
    memory = MemoryModel.of(spec, None, machine, weights=weights)
    try:
        return choose_plan(spec, memory, machine)
    except UserError:
        return None


def rows(weights: Sequence[Weights] = ("none", "int8")) -> list[dict[str, object]]:
    """Return a row for each checkpoint, kind of weights and card."""
    found = []
    for spec in (*reversed(released("t2v")), *reversed(released("i2v"))):
        for kind in weights:
            for card in CARDS:
                plan = plan_on_card(spec.name, card, kind)
                found.append({"model": spec.name, "weights": kind, "card": card} | _facts(plan))
    return found


def _facts(plan: MemoryPlan | None) -> dict[str, object]:
    if plan is None:
        return {"plan": None}
    return {
        "plan": plan.offload,
        "tiles": plan.tiling,
        "frames": plan.frames,
        "gib": round(plan.need / GIB, 1),
        "system_gib": round(plan.memory.offloaded_bytes(plan.offload) / GIB, 1),
    }


def markdown(found: Sequence[dict[str, object]]) -> str:
    """Return a table with a line for each checkpoint and kind of weights, and a column for each card."""
    cards = list(dict.fromkeys(row["card"] for row in found))
    lines = [
        "| model, weights | " + " | ".join(f"{card} GB" for card in cards) + " |",
        "|---" * (len(cards) + 1) + "|",
    ]
    for model, kind in dict.fromkeys((row["model"], row["weights"]) for row in found):
        cells = [_cell(row) for row in found if (row["model"], row["weights"]) == (model, kind)]
        label = f"`{model}`" + ("" if kind == "none" else f", {kind}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, object]) -> str:
    if row["plan"] is None:
        return "none"
    tiles = ", tiles" if row["tiles"] else ""
    frames = f", {row['frames']} frames" if row["frames"] else ""
    return f"{row['plan']}{tiles}{frames} {row['gib']}"
