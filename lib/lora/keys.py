"""Read a LoRA file: keys in whatever layout a trainer wrote them -> pairs of matrices per module.

| layout | key |
|---|---|
| diffusers | transformer.transformer_blocks.0.attn1.to_q.lora_A.weight, also .lora.down.weight |
| peft | base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight |
| wrapper | diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight |
| plain | transformer_blocks.0.attn1.to_q.lora_A.weight |
| ComfyUI's own | diffusion_model.blocks.0.q.lora_A.weight |
| kohya (VideoX-Fun) | lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight, .alpha |

Every key is used or the file is refused: a part that a loader silently skips shows up only in the video.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.lora.file import FLOATS, Header, Tensor, read_alphas, read_header
from lib.lora.scaling import Scaling, resolve_scaling
from lib.models.specs import SPECS, TASK_NAMES, ModelSpec

Shapes = Mapping[str, tuple[int, int]]
"""Linear modules of a transformer: name -> (outputs, inputs)."""

RECORD = "cogvideox"
"""The metadata in which our trainer records base, task and trigger word."""
PREFIXES = {
    "base_model.model.": "peft",
    "model.diffusion_model.": "wrapper",
    "diffusion_model.": "wrapper",
    "transformer.": "diffusers",
    "module.": "plain",
}
COMPILED = "_orig_mod."
"""What torch.compile adds to names, at any place."""
CORE_BLOCK = re.compile(r"blocks\.(\d+)\.(q|k|v|attn_out|ff_proj|ff_out)(?=\.)")
CORE_MODULES = {
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "attn_out": "attn1.to_out.0",
    "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2",
}
"""ComfyUI core's names of a block's modules."""
FLAT = re.compile(r"(?:lora_unet|lora_transformer)_+(?=[a-z])")
PAIR = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<letter>[AB])(?:\.(?!(?:weight|bias)$).+?)?"
    r"|(?:\.lora[._]|\.lora_linear_layer\.|_lora\.)(?P<way>down|up))(?:\.weight)?"
)
ALPHA = re.compile(r"(?P<module>.+)\.(?:lora_)?alpha")
BLOCK = re.compile(r"(?:^|[._])(?:transformer_)?(?:blocks|layers)[._](\d+)[._]")
UNSUPPORTED = {
    r"\.dora_scale": "it is a DoRA; its magnitudes would be left out",
    r"\.lora_magnitude_vector": "it is a DoRA; its magnitudes would be left out",
    r"\.lokr_": "it is a LoKr, not a LoRA",
    r"\.hada_": "it is a LoHa, not a LoRA",
    r"\.oft_": "it is an OFT, not a LoRA",
    r"\.lora_mid": "it has a third matrix (LoCon), which linear layers do not have",
    r"\.lora_embedding_": "it trains embeddings, which these transformers do not have",
    r"\.lora_(?:B|up)(?:\.\w+)?\.bias$": "it trains biases in addition to its matrices",
    r"\.diff(?:_b)?$": "it stores full weight differences, not LoRA pairs",
    r"\.matrix_[AB]\.": "it is a LoRA in SAT's layout; convert it with script/export-lora or the predictor "
    "predict_export_lora",
}
"""Keys that are not loaded, and why."""
TEXT_ENCODERS = ("text_encoder", "lora_te", "te_", "te1_", "te2_")
LISTED = 3


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
    _refuse_unsupported(list(header.tensors), name)
    layout, matrix_keys, alpha_keys = _sort_keys(header, shapes, name)
    pairs = _pair_matrices(header, matrix_keys, name)
    found = {
        module: (header.tensors[pair.up].shape[0], header.tensors[pair.down].shape[1])
        for module, pair in pairs.items()
    }
    _check_base(found, shapes, recorded, spec, name)
    if stray := sorted(set(alpha_keys) - set(pairs)):
        raise UserError(f"{name} is incomplete: it has an alpha for {stray[0]!r} but no matrices.")
    return LoraFile(
        path=path,
        name=name,
        layout=layout,
        pairs=pairs,
        scaling=resolve_scaling(
            header.metadata,
            adapter_config,
            ranks={module: pair.rank for module, pair in pairs.items()},
            alpha_tensors=read_alphas(path, alpha_keys, name),
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


def without_prefix(key: str) -> tuple[str, str]:
    """Return the layout that a key's prefixes show, and the key without them."""
    layout, key = "plain", key.replace(COMPILED, "")
    while prefix := next((each for each in PREFIXES if key.startswith(each)), None):
        layout = PREFIXES[prefix] if layout == "plain" else layout
        key = key.removeprefix(prefix)
    if core := CORE_BLOCK.match(key):
        key = f"transformer_blocks.{core[1]}.{CORE_MODULES[core[2]]}{key[core.end() :]}"
    return layout, key


def _refuse_unsupported(keys: list[str], name: str) -> None:
    if not keys:
        raise UserError(f"{name} holds no tensors.")
    for key in keys:
        for pattern, reason in UNSUPPORTED.items():
            if re.search(pattern, key):
                raise UserError(f"{name} cannot be loaded: {reason} ({key[:120]!r}).")
        if key.startswith(TEXT_ENCODERS):
            raise UserError(
                f"{name} cannot be loaded: it trains the text encoder too ({key[:120]!r}), and only LoRAs of "
                "the transformer are supported. Train or export it without."
            )


def _sort_keys(
    header: Header, shapes: Shapes, name: str
) -> tuple[str, dict[tuple[str, str], str], dict[str, str]]:
    """Return the layout, (module, "down" or "up") -> key, and module -> key of its alpha."""
    flattened = {module.replace(".", "_"): module for module in shapes}
    matrices: dict[tuple[str, str], str] = {}
    alphas: dict[str, str] = {}
    layouts: list[str] = []
    unknown: list[str] = []
    for key in header.tensors:
        flat = FLAT.match(key)
        layout, rest = ("kohya", key[flat.end() :]) if flat else without_prefix(key)
        if match := PAIR.fullmatch(rest):
            side = match["way"] or {"A": "down", "B": "up"}[match["letter"]]
            place = (_module(match["module"], flattened), side)
            earlier = matrices.setdefault(place, key)
        elif match := ALPHA.fullmatch(rest):
            earlier = alphas.setdefault(_module(match["module"], flattened), key)
        else:
            unknown.append(key)
            continue
        if earlier != key:
            raise UserError(f"{name} has two tensors for one matrix: {earlier[:120]!r} and {key[:120]!r}.")
        layouts.append(layout)
    if unknown:
        some = ", ".join(repr(key[:120]) for key in unknown[:LISTED]) + " ..." * (len(unknown) > LISTED)
        raise UserError(
            f"{name} is not a supported LoRA: {len(unknown)} of its {len(header.tensors)} tensors are not "
            f"LoRA matrices: {some}. It may be a full model, or trained with more than LoRA."
        )
    return max(set(layouts), key=layouts.count), matrices, alphas


def _module(written: str, flattened: Mapping[str, str]) -> str:
    """Return the module's name in the transformer, or what was written when it has no such module."""
    module = written if "." in written else flattened.get(written, written)
    return f"{module}.0" if module.endswith(".to_out") else module


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
    reason = _mismatch(found, shapes)
    base, task = _known_base(recorded.get("base")), str(recorded.get("task") or "")
    if reason is None and base and spec.name in SPECS and base != spec.name:
        reason = "the shapes are the same, but the training recorded the other base"
    if reason is None and task in TASK_NAMES and task != spec.task:
        reason = f"it was trained for {TASK_NAMES[task]} and this model does {TASK_NAMES[spec.task]}"
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


def _guess_base(found: Shapes) -> str:
    """Return the known models of the LoRA's attention width, else the sizes that it shows."""
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
