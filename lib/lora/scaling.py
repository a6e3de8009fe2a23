"""How strongly a LoRA counts: alpha / rank per module, from whichever record its trainer left."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lib.errors import UserError

BAKED = "alpha_over_rank_applied"
"""Metadata of a file whose B matrices were multiplied by alpha / rank already: not to be scaled again."""
LITERAL = re.compile(r"[\w.]+", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """Alpha per module as a file stores it, and whether it is divided by the rank or by its root."""

    alphas: dict[str, float]
    rslora: bool = False

    def summary(self) -> str:
        low, high = min(self.alphas.values()), max(self.alphas.values())
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def declared_scaling(
    metadata: Mapping[str, str],
    adapter_config: dict | None,
    *,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    name: str,
) -> Scaling | None:
    """Return what a file declares, None when it declares nothing.

    A converted file says that its alpha is applied: then alpha is the rank. Else, in this order:
    `lora_adapter_metadata` in the file (diffusers), `lora_config` in the file (finetrainers),
    adapter_config.json beside it (peft); `alphas` are those stored as tensors (kohya). Raises UserError when
    two of them contradict each other, or one contradicts the ranks of the matrices.
    """
    if BAKED in metadata:
        return Scaling(alphas={module: float(rank) for module, rank in ranks.items()})
    config = (
        _parsed(metadata.get("lora_adapter_metadata"), name)
        or _parsed(metadata.get("lora_config"), name)
        or adapter_config
        or {}
    )
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    declared = _from_config(config, ranks, name) if config.get("lora_alpha") is not None else None
    if not alphas:
        return declared
    if missing := [module for module in ranks if module not in alphas]:
        raise UserError(f"{name} stores alphas, but none for {missing[0][:120]!r}; the file is not whole.")
    stored = Scaling(alphas={module: _positive(alphas[module], name) for module in ranks})
    if declared is not None and (declared.rslora or not _agree(declared.alphas, stored.alphas)):
        raise UserError(
            f"{name} stores alpha twice and differently: {declared.summary()} in its metadata and "
            f"{stored.summary()} as tensors."
        )
    return stored


def _agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    # Alphas stored as tensors may be rounded to 16 bits.
    return all(math.isclose(one[module], other[module], rel_tol=0.01) for module in one)


def _parsed(text: str | None, name: str) -> dict | None:
    if not text:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{name}: the metadata that should hold its rank and alpha is no JSON object.")
    return content


def _from_config(config: Mapping[str, object], ranks: Mapping[str, int], name: str) -> Scaling:
    kind = str(config.get("peft_type") or "LORA")
    if kind.rpartition(".")[2].upper() != "LORA":
        raise UserError(f"{name} cannot be loaded: its metadata calls it a {kind[:40]}, not a LoRA.")
    if config.get("use_dora"):
        raise UserError(f"{name} cannot be loaded: its metadata calls it a DoRA.")
    if config.get("layer_replication"):
        raise UserError(f"{name} cannot be loaded: it repeats layers (layer_replication).")
    rank, alpha = config.get("r"), _positive(config["lora_alpha"], name)
    rank_pattern, alpha_pattern = (_pattern(config, key, name) for key in ("rank_pattern", "alpha_pattern"))
    for module, found in ranks.items():
        said = _looked_up(rank_pattern, module, rank)
        if said is not None and said != found:
            raise UserError(
                f"{name}: its metadata says rank {said!s:.20} for {module[:120]!r} and its "
                f"matrices have {found}."
            )
    return Scaling(
        alphas={module: _positive(_looked_up(alpha_pattern, module, alpha), name) for module in ranks},
        rslora=bool(config.get("use_rslora")),
    )


def _pattern(config: Mapping[str, object], key: str, name: str) -> dict[str, object]:
    """One of peft's patterns. They are regular expressions there; from strangers only names are taken."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{name}: {key} in its metadata is no JSON object.")
    names = {written.removeprefix("^").removesuffix("$"): value for written, value in pattern.items()}
    if odd := [written for written in names if not LITERAL.fullmatch(written)]:
        raise UserError(
            f"{name} cannot be loaded: {key} in its metadata holds {odd[0][:120]!r}, and only names of "
            "modules are understood there."
        )
    return names


def _looked_up(pattern: Mapping[str, object], module: str, default: object) -> object:
    for written, value in pattern.items():
        if module == written or module.endswith(f".{written}"):
            return value
    return default


def _positive(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name} stores {value!s:.40} as an alpha; it has to be a number above 0.")
    return float(value)
