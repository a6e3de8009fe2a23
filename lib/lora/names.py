"""What the keys of a LoRA file mean, in whatever layout a trainer wrote them.

| layout | key |
|---|---|
| diffusers | transformer.transformer_blocks.0.attn1.to_q.lora_A.weight, also .lora.down.weight |
| peft | base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight |
| wrapper | diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight |
| plain | transformer_blocks.0.attn1.to_q.lora_A.weight |
| ComfyUI's own | diffusion_model.blocks.0.q.lora_A.weight |
| kohya (VideoX-Fun) | lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight, .alpha |
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lib.errors import UserError, shown

PREFIXES = {
    "base_model.model.": "peft",
    "model.diffusion_model.": "wrapper",
    "diffusion_model.": "wrapper",
    "transformer.": "diffusers",
    "module.": "plain",
    "pipe.dit.": "plain",
    "dit.": "plain",
}
WRAPPERS = re.compile(
    r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|(?<=\.)processor\.(?=to_)"
)
"""What torch.compile, FSDP, checkpointing and diffusers' old processors add to names, at any place."""
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
FLAT = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_+(?=[a-z])")
PAIR = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<letter>[AB])(?:\.(?!(?:weight|bias)$)(?P<adapter>.+?))?"
    r"|(?:\.lora[._]|\.lora_linear_layer\.|_lora\.)(?P<way>down|up))(?:\.weight)?"
)
ALPHA = re.compile(r"(?P<module>.+)\.(?:lora_)?alpha")
UNSUPPORTED = {
    r"\.dora_scale": "it is a DoRA; its magnitudes would be left out",
    r"\.lora_magnitude_vector": "it is a DoRA; its magnitudes would be left out",
    r"\.lokr_": "it is a LoKr, not a LoRA",
    r"\.hada_": "it is a LoHa, not a LoRA",
    r"\.oft_": "it is an OFT, not a LoRA",
    r"\.lora_mid": "it has a third matrix (LoCon), which linear layers do not have",
    r"\.lora_embedding_": "it trains embeddings, which these transformers do not have",
    r"\.lora_(?:B|up)(?:\..+)?\.bias$": "it trains biases in addition to its matrices",
    r"\.diff(?:_b)?$": "it stores full weight differences, not LoRA pairs",
    r"\.matrix_[AB]\.": "it is a LoRA in SAT's layout; convert it with script/export-lora or the predictor "
    "predict_export_lora",
}
"""Keys that are not loaded, and why."""
TEXT_ENCODERS = ("text_encoder", "lora_te", "te_", "te1_", "te2_")
LISTED = 3
MAX_KEY_CHARACTERS = 500
"""Matching takes a time that grows with the square of a name's length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """The keys of a file by what they mean."""

    layout: str
    matrices: dict[tuple[str, str], str]
    """(module, "down" or "up") -> key."""
    alphas: dict[str, str]
    """Module -> key."""


def sort_keys(keys: Collection[str], modules: Iterable[str], *, name: str) -> Keys:
    """Return what each key means. Raises UserError for a key that has no meaning, and for several adapters.

    `modules` are the names that flat ones (kohya's, with _ for dots) may stand for.
    """
    if longest := max((key for key in keys if len(key) > MAX_KEY_CHARACTERS), key=len, default=""):
        raise UserError(
            f"{name} is not a supported LoRA: {shown(longest)} has {len(longest):,} characters; names of "
            f"tensors may have {MAX_KEY_CHARACTERS}."
        )
    _refuse_unsupported(keys, name)
    flattened = {name: module for module in modules for name in _flat_names(module)}
    matrices: dict[tuple[str, str], str] = {}
    alphas: dict[str, str] = {}
    layouts: list[str] = []
    unknown: list[str] = []
    adapters: set[str] = set()
    for key in keys:
        flat = FLAT.match(key)
        layout, rest = ("kohya", key[flat.end() :]) if flat else _without_prefix(key)
        if match := PAIR.fullmatch(rest):
            side = match["way"] or {"A": "down", "B": "up"}[match["letter"]]
            place = (_module(match["module"], flattened), side)
            adapters.add(match["adapter"] or "")
            earlier = matrices.setdefault(place, key)
        elif match := ALPHA.fullmatch(rest):
            earlier = alphas.setdefault(_module(match["module"], flattened), key)
        else:
            unknown.append(key)
            continue
        if earlier != key and len(adapters) < 2:
            raise UserError(f"{name} has two tensors for one matrix: {earlier[:120]!r} and {key[:120]!r}.")
        layouts.append(layout)
    if len(adapters) > 1:
        raise UserError(
            f"{name} holds several adapters: {', '.join(shown(each) for each in sorted(adapters)[:LISTED])}. "
            "Save the one to use in a file of its own."
        )
    if unknown:
        some = ", ".join(repr(key[:120]) for key in unknown[:LISTED]) + " ..." * (len(unknown) > LISTED)
        raise UserError(
            f"{name} is not a supported LoRA: {len(unknown)} of its {len(keys)} tensors are not "
            f"LoRA matrices: {some}. It may be a full model, or trained with more than LoRA."
        )
    layout = max(set(layouts), key=layouts.count) if layouts else "plain"
    return Keys(layout=layout, matrices=matrices, alphas=alphas)


def _without_prefix(key: str) -> tuple[str, str]:
    """Return the layout that a key's prefixes show, and the key without them."""
    layout, key = "plain", WRAPPERS.sub("", key)
    while prefix := next((each for each in PREFIXES if key.startswith(each)), None):
        layout = PREFIXES[prefix] if layout == "plain" else layout
        key = key.removeprefix(prefix)
    if core := CORE_BLOCK.match(key):
        key = f"transformer_blocks.{core[1]}.{CORE_MODULES[core[2]]}{key[core.end() :]}"
    return layout, key


def _flat_names(module: str) -> Iterator[str]:
    """Return the names with _ for dots that stand for a module: its own, without a last 0, and ComfyUI's."""
    yield module.replace(".", "_")
    yield module.removesuffix(".0").replace(".", "_")
    for core, own in CORE_MODULES.items():
        if match := re.fullmatch(rf"transformer_blocks\.(\d+)\.{re.escape(own)}", module):
            yield f"blocks_{match[1]}_{core}"


def _refuse_unsupported(keys: Collection[str], name: str) -> None:
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


def _module(written: str, flattened: Mapping[str, str]) -> str:
    """Return the module's name in the transformer, or what was written when it has no such module."""
    module = written if "." in written else flattened.get(written, written)
    return f"{module}.0" if module.endswith(".to_out") else module
