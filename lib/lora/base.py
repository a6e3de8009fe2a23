"""Which base a LoRA was made for: what its file records, else what its shapes suggest; refused on another."""

import json
import re
from collections.abc import Mapping

from lib.errors import UserError
from lib.models.specs import SPECS, TASK_NAMES, ModelSpec

RECORD = "cogvideox"
BLOCK = re.compile(r"(?:^|[._])(?:transformer_)?(?:blocks|layers)[._](\d+)[._]")


def recorded_facts(metadata: Mapping[str, str]) -> dict[str, object]:
    """What our trainer recorded in the file's metadata; empty for files of others."""
    try:
        facts = json.loads(metadata.get(RECORD, "{}"))
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def check_base(
    found: Mapping[str, tuple[int, int]],
    shapes: Mapping[str, tuple[int, int]],
    recorded: Mapping[str, object],
    spec: ModelSpec,
    *,
    name: str,
) -> None:
    """Raise UserError, naming both bases, unless the LoRA's modules (outputs, inputs) are the transformer's.

    Files of bases that share their shapes (text-to-video and image-to-video 5B) are told apart by what
    their trainer recorded.
    """
    reason = _misfit(found, shapes)
    base, task = _known(recorded.get("base")), recorded.get("task")
    if reason is None and base and spec.name in SPECS and base != spec.name:
        reason = "both have the same shapes, but its training was recorded"
    if reason is None and task in TASK_NAMES and task != spec.task:
        reason = f"it was trained for {TASK_NAMES[task]} and this model does {TASK_NAMES[spec.task]}"
    if reason is not None:
        made_for = str(recorded.get("base") or "")[:100] or _guess(found)
        raise UserError(
            f"{name} was made for another base: {made_for}. This model is {spec.name} ({reason}). Use it "
            "with its own base, or a LoRA made for this one."
        )


def _misfit(found: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, int]]) -> str | None:
    for module, sides in found.items():
        if module not in shapes:
            return f"which has no module {module[:120]!r}"
        if sides != shapes[module]:
            here, there = ("{1} to {0}".format(*pair) for pair in (shapes[module], sides))
            return f"whose {module[:120]!r} goes from {here}, the LoRA's from {there}"
    return None


def _known(base: object) -> str | None:
    """The name of the spec that a recorded base stands for: its name, or its repository under any owner."""
    text = str(base or "").partition("@")[0].lower()
    for spec in SPECS.values():
        repository = (spec.repository or "").lower().rpartition("/")[2]
        if text == spec.name or (repository and text.rpartition("/")[2] == repository and "/" in text):
            return spec.name
    return None


def _guess(found: Mapping[str, tuple[int, int]]) -> str:
    """The known models of that attention width, else the sizes that the LoRA shows."""
    widths = [sides[1] for module, sides in found.items() if re.search(r"attn1[._]to_[qkv]$", module)]
    depths = [int(match[1]) for module in found if (match := BLOCK.search(module))]
    width = max(widths, default=None)
    named = [spec.name for spec in SPECS.values() if width is not None and spec.attention_width == width]
    if any(module.startswith("ofs_embedding") for module in found):
        named = [model for model in named if SPECS[model].task == "i2v"] or named
    if named and not any(module.startswith("blocks") for module in found):
        return " or ".join(named)
    if width is None:
        return f"a model with modules like {next(iter(found))[:120]!r}"
    return f"a model of width {width}" + (f" with {max(depths) + 1} or more blocks" if depths else "")
