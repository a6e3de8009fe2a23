"""A LoRA file's keys, in whatever layout a trainer wrote them -> pairs of matrices per module, and scaling.

| layout | key |
|---|---|
| diffusers | transformer.transformer_blocks.0.attn1.to_q.lora_A.weight, also .lora.down.weight |
| peft | base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight |
| wrapper | diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight |
| plain | transformer_blocks.0.attn1.to_q.lora_A.weight |
| kohya (VideoX-Fun) | lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight, .alpha |

Every key is used or the file is refused: what a loader leaves out silently is found only in the video.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError
from lib.lora import base
from lib.lora.file import FLOATS, Header, Tensor, read_header
from lib.lora.scaling import Scaling, declared_scaling
from lib.models.specs import ModelSpec

Shapes = Mapping[str, tuple[int, int]]
"""Linear modules of a transformer: name -> (outputs, inputs)."""

PREFIXES = {
    "base_model.model.": "peft",
    "model.diffusion_model.": "wrapper",
    "diffusion_model.": "wrapper",
    "transformer.": "diffusers",
}
FLAT = re.compile(r"(?:lora_unet|lora_transformer)_+(?=[a-z])")
PAIR = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<letter>[AB])(?:\.(?!(?:weight|bias)$)\w+)?"
    r"|(?:\.lora[._]|\.lora_linear_layer\.|_lora\.)(?P<way>down|up))(?:\.weight)?"
)
ALPHA = re.compile(r"(?P<module>.+)\.(?:lora_)?alpha")
# What these keys belong to, and why it is not loaded.
UNSUPPORTED = {
    r"\.dora_scale": "it is a DoRA; its magnitudes would be left out",
    r"\.lora_magnitude_vector": "it is a DoRA; its magnitudes would be left out",
    r"\.lokr_": "it is a LoKr, which is another method than LoRA",
    r"\.hada_": "it is a LoHa, which is another method than LoRA",
    r"\.oft_": "it is an OFT, which is another method than LoRA",
    r"\.lora_mid": "it has a third matrix (LoCon), which linear layers have not",
    r"\.lora_embedding_": "it trains embeddings, which these transformers have not",
    r"\.lora_(?:B|up)(?:\.\w+)?\.bias$": "it trains biases beside its matrices",
    r"\.diff(?:_b)?$": "it holds whole differences of weights, not LoRA pairs",
    r"\.matrix_[AB]\.": "it is a LoRA in SAT's own layout, of which script/export-lora, or the predictor "
    "predict_export_lora, makes one that can",
}
TEXT_ENCODERS = ("text_encoder", "lora_te", "te_", "te1_", "te2_")
NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One module's two matrices by their keys in the file: `down` [rank, inputs], `up` [outputs, rank]."""

    down: str
    up: str
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """A file whose every key is understood and fits the transformer; no tensor of it is loaded yet."""

    path: Path
    name: str
    """What messages call it."""
    layout: str
    pairs: dict[str, Pair]
    """Module name -> its matrices."""
    scaling: Scaling | None
    """What the file, or the configuration beside it, says about alpha; None when it says nothing."""
    recorded: dict[str, object]
    """What our trainer wrote about itself: base, task, trigger word, steps."""
    elements: int

    @property
    def trigger_word(self) -> str:
        return str(self.recorded.get("trigger_word") or "")

    def alphas(self, given: float | None, *, slot: str = "lora") -> dict[str, float]:
        """Return alpha per module; `given` is the input {slot}_alpha, refused where the file has its own."""
        if self.scaling is None:
            return {module: float(given or pair.rank) for module, pair in self.pairs.items()}
        if given is not None:
            raise UserError(
                f"{slot}_alpha={given:g} was given, but {self.name} stores its own alpha, "
                f"{self.scaling.summary()}; leave {slot}_alpha out."
            )
        return self.scaling.alphas

    def ranks(self) -> str:
        ranks = sorted({pair.rank for pair in self.pairs.values()})
        return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def read_lora(
    path: Path, *, name: str, shapes: Shapes, spec: ModelSpec, adapter_config: dict | None = None
) -> LoraFile:
    """Read a file's header and match it with the transformer of `shapes`; `name` is what was given.

    `adapter_config` is the adapter_config.json beside it, if there is one. Raises UserError for a file that
    is damaged, of another kind, made for another base, or that holds a key without a meaning here.
    """
    header = read_header(path, name=name)
    recorded = base.recorded_facts(header.metadata)
    _refuse_unsupported(list(header.tensors), name)
    layout, sides, alpha_keys = _sorted_keys(header, shapes, name)
    pairs = _pairs(header, sides, name)
    found = {
        module: (header.tensors[pair.up].shape[0], header.tensors[pair.down].shape[1])
        for module, pair in pairs.items()
    }
    base.check_base(found, shapes, recorded, spec, name=name)
    if stray := sorted(set(alpha_keys) - set(pairs)):
        raise UserError(f"{name} has an alpha for {stray[0]!r} but no matrices; the file is not whole.")
    return LoraFile(
        path=path,
        name=name,
        layout=layout,
        pairs=pairs,
        scaling=declared_scaling(
            header.metadata,
            adapter_config,
            ranks={module: pair.rank for module, pair in pairs.items()},
            alphas=_read_alphas(path, alpha_keys, name),
            name=name,
        ),
        recorded=recorded,
        elements=sum(pairs[module].rank * sum(sides) for module, sides in found.items()),
    )


def _refuse_unsupported(keys: list[str], name: str) -> None:
    if not keys:
        raise UserError(f"{name} holds no tensors at all.")
    for key in keys:
        for mark, reason in UNSUPPORTED.items():
            if re.search(mark, key):
                raise UserError(f"{name} cannot be loaded: {reason} ({key[:120]!r}).")
        if key.startswith(TEXT_ENCODERS):
            raise UserError(
                f"{name} cannot be loaded: it trains the text encoder too ({key[:120]!r}), and only LoRAs of "
                "the transformer are used here. Train or export it without."
            )


def _sorted_keys(
    header: Header, shapes: Shapes, name: str
) -> tuple[str, dict[tuple[str, str], str], dict[str, str]]:
    """Return the layout, (module, "down" or "up") -> key, and module -> key of its alpha."""
    flattened = {module.replace(".", "_"): module for module in shapes}
    sides: dict[tuple[str, str], str] = {}
    alphas: dict[str, str] = {}
    layouts: list[str] = []
    unknown = []
    for key in header.tensors:
        layout, rest = _without_prefix(key)
        if match := PAIR.fullmatch(rest):
            side = match["way"] or {"A": "down", "B": "up"}[match["letter"]]
            place, target = (_module(match["module"], flattened), side), sides
        elif match := ALPHA.fullmatch(rest):
            place, target = _module(match["module"], flattened), alphas
        else:
            unknown.append(key)
            continue
        if place in target:
            raise UserError(
                f"{name} has two tensors for one place: {target[place][:120]!r} and {key[:120]!r}."
            )
        target[place] = key
        layouts.append(layout)
    if unknown:
        some = ", ".join(repr(key[:120]) for key in unknown[:NAMED]) + " ..." * (len(unknown) > NAMED)
        raise UserError(
            f"{name} is not a LoRA that is understood here: {len(unknown)} of its {len(header.tensors)} "
            f"tensors are no LoRA matrices: {some}. It may be a whole model, or trained with more than LoRA."
        )
    return max(set(layouts), key=layouts.count), sides, alphas


def _without_prefix(key: str) -> tuple[str, str]:
    layout = "plain"
    if match := FLAT.match(key):
        return "kohya", key[match.end() :]
    found = True
    while found:
        found = False
        for prefix, meaning in PREFIXES.items():
            if key.startswith(prefix):
                layout = meaning if layout == "plain" else layout
                key, found = key.removeprefix(prefix), True
    return layout, key


def _module(written: str, flattened: Mapping[str, str]) -> str:
    """The module's name in the transformer, or what was written when it has no such module."""
    module = written if "." in written else flattened.get(written, written)
    return f"{module}.0" if module.endswith(".to_out") else module


def _pairs(header: Header, sides: Mapping[tuple[str, str], str], name: str) -> dict[str, Pair]:
    pairs = {}
    for module in dict.fromkeys(module for module, _ in sides):
        keys = [sides.get((module, side)) for side in ("down", "up")]
        if None in keys:
            there = next(key for key in keys if key is not None)
            raise UserError(f"{name} has {there[:120]!r} without its other half; the file is not whole.")
        down, up = (_matrix(key, header.tensors[key], name) for key in keys)
        if down.shape[0] != up.shape[1] or not all((*down.shape, *up.shape)):
            raise UserError(
                f"{name}: the matrices of {module[:120]!r} do not fit each other: "
                f"{list(down.shape)} and {list(up.shape)}."
            )
        pairs[module] = Pair(down=keys[0], up=keys[1], rank=down.shape[0])
    if not pairs:
        raise UserError(f"{name} holds no LoRA matrices.")
    return pairs


def _matrix(key: str, tensor: Tensor, name: str) -> Tensor:
    if len(tensor.shape) != 2:
        raise UserError(
            f"{name} cannot be loaded: {key[:120]!r} has {len(tensor.shape)} dimensions, and only LoRAs of "
            "linear layers, with 2, are."
        )
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{name} cannot be loaded: {key[:120]!r} is stored as {tensor.dtype[:20]}; allowed are float32, "
            "float16, bfloat16 and float64."
        )
    return tensor


def _read_alphas(path: Path, keys: Mapping[str, str], name: str) -> dict[str, float]:
    if not keys:
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {module: _scalar(file.get_tensor(key)) for module, key in keys.items()}
    except SafetensorError as error:
        raise UserError(f"{name} is no whole safetensors file: {error}. Get it again.") from error


def _scalar(tensor) -> float:  # type: ignore[no-untyped-def]
    return float(tensor.double()) if tensor.numel() == 1 else float("nan")
