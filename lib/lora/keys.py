"""Read a LoRA file: its keys -> pairs of matrices per module, checked against a transformer.

Every key is used or the file is refused: a part that a loader silently skips shows up only in the video.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.lora.file import FLOATS, RECORD, Header, Tensor, read_alphas, read_header
from lib.lora.names import sort_keys
from lib.lora.scaling import Scaling, resolve_scaling
from lib.models.specs import SPECS, TASK_NAMES, ModelSpec

Shapes = Mapping[str, tuple[int, int]]
"""Linear modules of a transformer: name -> (outputs, inputs)."""

BLOCK = re.compile(r"(?:^|[._])(?:transformer_)?(?:blocks|layers)[._](\d+)[._]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One module's two matrices by their keys in the file: `down` [rank, inputs], `up` [outputs, rank]."""

    down: str
    up: str
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """A file whose every key is known and fits the transformer. None of its tensors is loaded yet."""

    path: Path
    name: str
    """Name in messages."""
    layout: str
    pairs: dict[str, Pair]
    """Module name -> its matrices."""
    scaling: Scaling
    recorded: dict[str, object]
    """Metadata that our trainer recorded: base, task, trigger word, steps."""
    elements: int

    @property
    def trigger_word(self) -> str:
        return str(self.recorded.get("trigger_word") or "")

    def rank_summary(self) -> str:
        """Return the ranks as messages show them: "4" or "2 to 6"."""
        ranks = sorted({pair.rank for pair in self.pairs.values()})
        return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def read_lora(
    path: Path,
    *,
    name: str,
    shapes: Shapes,
    spec: ModelSpec,
    adapter_config: dict[str, Any] | None = None,
    alpha: float | None = None,
    alpha_name: str = "lora_alpha",
) -> LoraFile:
    """Read a file's header, match its keys with a transformer's modules and resolve its scaling.

    Args:
        name: What messages call the file.
        shapes: The transformer's linear modules.
        adapter_config: The adapter_config.json that came with the file.
        alpha: The request's alpha, for a file that stores none; the input is called `alpha_name`.

    Raises:
        UserError: The file is damaged, of another kind, made for another base, holds an unknown key, or
            stores an alpha although `alpha` was given.
    """
    header = read_header(path, name=name)
    recorded = recorded_facts(header.metadata)
    keys = sort_keys(header.tensors, shapes, name=name)
    pairs = _pair_matrices(header, keys.matrices, name)
    found = {
        module: (header.tensors[pair.up].shape[0], header.tensors[pair.down].shape[1])
        for module, pair in pairs.items()
    }
    _check_base(found, shapes, recorded, spec, name)
    if stray := sorted(set(keys.alphas) - set(pairs)):
        raise UserError(f"{name} is incomplete: it has an alpha for {stray[0][:120]!r} but no matrices.")
    return LoraFile(
        path=path,
        name=name,
        layout=keys.layout,
        pairs=pairs,
        scaling=resolve_scaling(
            header.metadata,
            adapter_config,
            ranks={module: pair.rank for module, pair in pairs.items()},
            alpha_tensors=read_alphas(path, keys.alphas, name),
            alpha_input=alpha,
            input_name=alpha_name,
            name=name,
        ),
        recorded=recorded,
        elements=sum(pairs[module].rank * sum(sides) for module, sides in found.items()),
    )


def recorded_facts(metadata: Mapping[str, str]) -> dict[str, object]:
    """Return what our trainer recorded in a file's metadata; empty for other files."""
    try:
        facts = json.loads(metadata.get(RECORD, "{}"))
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _pair_matrices(header: Header, keys: Mapping[tuple[str, str], str], name: str) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {}
    for module in dict.fromkeys(module for module, _ in keys):
        down_key, up_key = keys.get((module, "down")), keys.get((module, "up"))
        if down_key is None or up_key is None:
            present = (down_key or up_key or "")[:120]
            raise UserError(f"{name} is incomplete: it has {present!r} without its other half.")
        down, up = (_matrix(key, header.tensors[key], name) for key in (down_key, up_key))
        if down.shape[0] != up.shape[1] or not all((*down.shape, *up.shape)):
            raise UserError(
                f"{name}: the matrices of {module[:120]!r} do not fit each other: "
                f"{list(down.shape)} and {list(up.shape)}."
            )
        pairs[module] = Pair(down=down_key, up=up_key, rank=down.shape[0])
    if not pairs:
        raise UserError(f"{name} holds no LoRA matrices.")
    return pairs


def _matrix(key: str, tensor: Tensor, name: str) -> Tensor:
    if len(tensor.shape) != 2:
        raise UserError(
            f"{name} cannot be loaded: {key[:120]!r} has {len(tensor.shape)} dimensions; only LoRAs of "
            "linear layers, with 2 dimensions, are supported."
        )
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{name} cannot be loaded: {key[:120]!r} is stored as {tensor.dtype[:20]}; allowed are float32, "
            "float16, bfloat16 and float64."
        )
    return tensor


def _check_base(
    found: Shapes, shapes: Shapes, recorded: Mapping[str, object], spec: ModelSpec, name: str
) -> None:
    """Raise UserError, naming both bases, unless the LoRA's modules are the transformer's.

    Bases with the same shapes (text-to-video and image-to-video 5B) differ in the trainer's record.
    """
    misfit = reason = _mismatch(found, shapes)
    base, task = _known_base(recorded.get("base")), str(recorded.get("task") or "")
    if reason is None and base and spec.name in SPECS and base != spec.name:
        reason = "the shapes are the same, but the training recorded the other base"
    if reason is None and task in TASK_NAMES and task != spec.task:
        reason = f"it was trained for {TASK_NAMES[task]} and this model does {TASK_NAMES[spec.task]}"
    is_same_kind = _attention_width(found) == spec.attention_width and _depth(found) <= _depth(shapes)
    if misfit and is_same_kind and base in (None, spec.name):
        raise UserError(f"{name} does not fit {spec.name}, {misfit}.")
    if reason is not None:
        made_for = str(recorded.get("base") or "")[:100] or _guess_base(found)
        raise UserError(
            f"{name} was made for another base: {made_for}. This model is {spec.name} ({reason}). Use it "
            "with its own base, or a LoRA made for this one."
        )


def _mismatch(found: Shapes, shapes: Shapes) -> str | None:
    for module, sides in found.items():
        if module not in shapes:
            return f"which has no module {module[:120]!r}"
        if sides != shapes[module]:
            here, there = ("{1} to {0}".format(*pair) for pair in (shapes[module], sides))
            return f"whose {module[:120]!r} maps {here}, the LoRA's {there}"
    return None


def _known_base(base: object) -> str | None:
    """Return the spec that a recorded base names: by its name, or by its repository under any owner."""
    text = str(base or "").partition("@")[0].lower()
    for spec in SPECS.values():
        repository = (spec.repository or "").lower().rpartition("/")[2]
        if text == spec.name or (repository and text.rpartition("/")[2] == repository and "/" in text):
            return spec.name
    return None


def _attention_width(found: Shapes) -> int | None:
    widths = [sides[1] for module, sides in found.items() if re.search(r"attn1[._]to_[qkv]$", module)]
    return max(widths, default=None)


def _depth(modules: Iterable[str]) -> int:
    """Return how many blocks the names show."""
    return max((int(match[1]) + 1 for module in modules if (match := BLOCK.search(module))), default=0)


def _guess_base(found: Shapes) -> str:
    """Return the known models of the LoRA's attention width, else the sizes that it shows."""
    width = _attention_width(found)
    depth = _depth(found)
    named = [spec.name for spec in SPECS.values() if width is not None and spec.attention_width == width]
    if any(module.startswith("ofs_embedding") for module in found):
        named = [model for model in named if SPECS[model].task == "i2v"] or named
    if named and not any(module.startswith("blocks") for module in found):
        return " or ".join(named)
    if width is None:
        return f"a model with modules like {next(iter(found))[:120]!r}"
    return f"a model of width {width}" + (f" with {depth} or more blocks" if depth else "")
