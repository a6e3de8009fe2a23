"""A LoRA's strength: the alpha of each module, read from its file and resolved once.

The product of a module's two matrices is multiplied by alpha / rank (rsLoRA: alpha / sqrt(rank)).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lib.errors import UserError
from lib.lora.file import RECORD

BAKED = "alpha_over_rank_applied"
"""Metadata of a converted file whose B matrices are already multiplied by alpha / rank."""
CONFIGS = ("lora_adapter_metadata", "lora_config")
"""Metadata that holds peft's configuration as JSON: diffusers', and finetrainers'."""
ALPHAS = frozenset({"lora_alpha", "network_alpha", "alpha"})
"""Metadata with an alpha as text, after `ss_` (kohya) or a module's name and a dot."""
OTHER_ALPHAS = re.compile(r"channel|noise|mask|matte|blend|image|video|background|loss|snr|ema|beta")
"""Words of metadata whose alpha is not a LoRA's: `use_alpha_channel`, `ss_noise_offset_alpha`."""
MAX_ALPHA = 1e6
"""Far above what anyone trains with, far below what overflows."""
MODULE_NAME = re.compile(r"[\w.]+", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """Alpha of every module, and whether it is divided by the rank's square root instead of the rank."""

    alphas: dict[str, float]
    rslora: bool = False

    def summary(self) -> str:
        """Return the alphas as messages show them: "8" or "1 to 10"."""
        low, high = min(self.alphas.values()), max(self.alphas.values())
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def resolve_scaling(
    metadata: Mapping[str, str],
    adapter_config: dict[str, Any] | None = None,
    *,
    ranks: Mapping[str, int],
    alpha_tensors: Mapping[str, float],
    alpha_input: float | None = None,
    input_name: str = "lora_alpha",
    name: str,
) -> Scaling:
    """Return the scaling that a file declares, else `alpha_input`, else the ranks (strength 1).

    A file declares its alpha in its metadata, as a configuration (CONFIGS) or as text (ALPHAS), in the
    adapter_config.json that came with it (peft), or in `alpha_tensors` (kohya). A converted file has alpha /
    rank multiplied in, so its alphas are its ranks.

    Raises:
        UserError: two declarations contradict each other, one contradicts the ranks or is not understood, or
            `alpha_input` was given for a file that declares its own. `name` is what the message calls the
            file.
    """
    if BAKED in metadata:
        declared = Scaling(alphas={module: float(rank) for module, rank in ranks.items()})
    else:
        configs = [_normalized(each) for each in (_header_config(metadata, name), adapter_config or {})]
        declared = _declared(_configured(configs, ranks, name), ranks, alpha_tensors, name)
    if declared is None:
        return Scaling(alphas={module: float(alpha_input or rank) for module, rank in ranks.items()})
    if alpha_input is not None:
        raise UserError(
            f"{input_name}={alpha_input:g} was given, but {name} stores its own alpha, "
            f"{declared.summary()}; leave {input_name} out."
        )
    return declared


def _header_config(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return the configuration in a file's metadata; empty without one.

    Raises UserError for metadata that says an alpha which is not understood, or two different ones.
    """
    found: dict[str, Any] = {}
    for key in CONFIGS:
        found = found or _parse_object(metadata.get(key), name) or {}
    alpha = _normalized(found).get("lora_alpha")
    for key, text in sorted(_stated(metadata)):
        if "alpha" not in key.lower() or text.strip().lower() in ("", "none", "null"):
            continue
        if OTHER_ALPHAS.search(key.lower()):
            continue
        if key.lower().rpartition(".")[2].removeprefix("ss_") not in ALPHAS:
            raise UserError(
                f"{name}: its metadata has {key[:60]!r} = {text[:60]!r}, an alpha that is not understood. "
                f"Known are {', '.join(sorted(ALPHAS))}."
            )
        stated = _positive(text, name)
        if alpha is not None and not math.isclose(stated, _positive(alpha, name)):
            raise UserError(f"{name} stores two different alphas in its metadata: {alpha} and {text[:40]}.")
        alpha = stated
        found = found or {"lora_alpha": stated}
    return found


def _stated(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Return names and values: of the metadata, and of known alphas in objects that it holds as JSON."""
    for key, text in metadata.items():
        if key in (*CONFIGS, RECORD):
            continue
        yield key, text
        try:
            waiting = [json.loads(text)] if text.lstrip()[:1] in ("{", "[") else []
        except (ValueError, RecursionError):
            continue
        while waiting:
            content = waiting.pop()
            if isinstance(content, dict):
                yield from (
                    (f"{key}.{inner}", str(value)) for inner, value in content.items() if _is_alpha(inner)
                )
            waiting += (
                content.values()
                if isinstance(content, dict)
                else content
                if isinstance(content, list)
                else []
            )


def _is_alpha(key: str) -> bool:
    return key.lower() in ALPHAS


def _normalized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with peft's names of its keys."""
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    others = [value for key, value in config.items() if _is_alpha(key) and value is not None]
    return {"lora_alpha": others[0], **config} if others else config


def _configured(configs: list[dict[str, Any]], ranks: Mapping[str, int], name: str) -> Scaling | None:
    """Return what the configurations declare; None if none has an alpha.

    Raises UserError if one is of no LoRA, or if two differ.
    """
    for config in configs:
        _check_kind(config, name)
    found = [_from_config(config, ranks, name) for config in configs if config.get("lora_alpha") is not None]
    for other in found[1:]:
        if other.rslora != found[0].rslora or not _agree(found[0].alphas, other.alphas):
            raise UserError(
                f"{name} stores two different alphas: {found[0].summary()} in its metadata and "
                f"{other.summary()} in adapter_config.json (or use_rslora differs). Remove the wrong one."
            )
    return found[0] if found else None


def _declared(
    configured: Scaling | None, ranks: Mapping[str, int], alpha_tensors: Mapping[str, float], name: str
) -> Scaling | None:
    if not alpha_tensors:
        return configured
    if missing := [module for module in ranks if module not in alpha_tensors]:
        raise UserError(f"{name} is incomplete: it stores alphas, but none for {missing[0][:120]!r}.")
    stored = Scaling(alphas={module: _positive(alpha_tensors[module], name) for module in ranks})
    if configured is not None and (configured.rslora or not _agree(configured.alphas, stored.alphas)):
        raise UserError(
            f"{name} stores two different alphas: {configured.summary()} in its metadata and "
            f"{stored.summary()} as tensors."
        )
    return stored


def _agree(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    # Alphas stored as tensors may be rounded to 16 bits.
    return all(math.isclose(one[module], other[module], rel_tol=0.01) for module in one)


def _parse_object(text: str | None, name: str) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{name}: the metadata with its rank and alpha is not a JSON object.")
    return content


def _check_kind(config: Mapping[str, Any], name: str) -> None:
    """Raise UserError for the configuration of something else than a LoRA."""
    kind = str(config.get("peft_type") or "LORA")
    if kind.rpartition(".")[2].upper() != "LORA":
        raise UserError(f"{name} cannot be loaded: its metadata calls it a {kind[:40]}, not a LoRA.")
    if _flag(config, "use_dora", name):
        raise UserError(f"{name} cannot be loaded: its metadata calls it a DoRA.")
    if config.get("layer_replication"):
        raise UserError(f"{name} cannot be loaded: it repeats layers (layer_replication).")


def _from_config(config: Mapping[str, Any], ranks: Mapping[str, int], name: str) -> Scaling:
    rank, alpha = config.get("r"), _positive(config["lora_alpha"], name)
    rank_pattern, alpha_pattern = (_pattern(config, key, name) for key in ("rank_pattern", "alpha_pattern"))
    for module, found in ranks.items():
        declared = _look_up(rank_pattern, module, rank)
        if declared is not None and _number(declared) != found:
            raise UserError(
                f"{name}: its metadata says rank {declared!s:.20} for {module[:120]!r}, but its matrices "
                f"have rank {found}."
            )
    return Scaling(
        alphas={module: _positive(_look_up(alpha_pattern, module, alpha), name) for module in ranks},
        rslora=_flag(config, "use_rslora", name),
    )


def _pattern(config: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    """Return one of peft's patterns, which are regular expressions there; here they may only be names."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{name}: {key} in its metadata is not a JSON object.")
    names = {written.removeprefix("^").removesuffix("$"): value for written, value in pattern.items()}
    if odd := [written for written in names if not MODULE_NAME.fullmatch(written)]:
        raise UserError(
            f"{name} cannot be loaded: {key} in its metadata contains {odd[0][:120]!r}, but only names of "
            "modules are supported there."
        )
    return names


def _look_up(pattern: Mapping[str, Any], module: str, default: object) -> object:
    for written, value in pattern.items():
        if module == written or module.endswith(f".{written}"):
            return value
    return default


def _flag(config: Mapping[str, Any], key: str, name: str) -> bool:
    """Return a truth value, also one written as text."""
    value = str(config.get(key) or False).strip().lower()
    if value not in ("true", "false", "1", "0"):
        raise UserError(f"{name}: {key} in its metadata is {value[:40]!r}, neither true nor false.")
    return value in ("true", "1")


def _number(value: object) -> float:
    """Return a number, also one written as text; NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _positive(value: object, name: str) -> float:
    if not 0 < (number := _number(value)) <= MAX_ALPHA:
        raise UserError(
            f"{name} stores {value!s:.40} as an alpha; it has to be a number above 0, at most {MAX_ALPHA:g}."
        )
    return number
