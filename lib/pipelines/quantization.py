"""8-bit weights of a video model through torchao: the linear layers of the transformer and of T5.

Only layers inside the blocks are quantized: embeddings, norms, positions and the transformer's input and
output layers are small and lose the most quality. "int8" and "fp8" store weights in 8 bits, with a scale for
each output, and compute in the model's dtype. The dynamic kinds also quantize activations, so that products
are computed in 8 bits, where this saves time: in the transformer, except its modulations (one row per clip),
and not in T5.
"""

from typing import Any, Literal

from diffusers import DiffusionPipeline
from torch import nn

from lib.settings import Quantization

QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "int8-dynamic", "fp8", "fp8-dynamic")
"""Supported by video models; int4 is only for captions."""
StoredWeights = Literal["none", "int8", "fp8"]


def stored_weights(kind: Quantization) -> StoredWeights:
    """Return how the weights are stored, regardless of the type of the products."""
    stored: dict[str, StoredWeights] = {"int8": "int8", "fp8": "fp8"}
    return stored.get(kind.removesuffix("-dynamic"), "none")


def quantize_pipeline(pipeline: DiffusionPipeline, kind: Quantization, *, device: str) -> None:
    """Quantize the weights layer by layer, so that at most one layer is in memory twice.

    Each layer is quantized on `device` and stays there. This cannot be undone or repeated.
    """
    from torchao.quantization import quantize_  # an optional package

    stored, computed = _configs(kind)
    blocks = pipeline.transformer.transformer_blocks
    quantize_(blocks, stored, filter_fn=_is_modulation, device=device)
    quantize_(blocks, computed, filter_fn=_is_projection, device=device)
    if pipeline.text_encoder is not None:
        quantize_(pipeline.text_encoder.encoder.block, stored, filter_fn=_is_linear, device=device)


def _configs(kind: Quantization) -> tuple[Any, Any]:
    """Return torchao's configs for layers that only store 8 bits, and for those that may compute in them."""
    from torchao import quantization as torchao  # an optional package

    # By default they set torch's precision and inductor's options for the whole process.
    options = {"set_inductor_config": False}
    if kind.startswith("int8"):
        stored = torchao.Int8WeightOnlyConfig(**options)
        dynamic = torchao.Int8DynamicActivationInt8WeightConfig
    else:
        stored = torchao.Float8WeightOnlyConfig(**options)
        dynamic = torchao.Float8DynamicActivationFloat8WeightConfig
    return stored, dynamic(**options) if kind.endswith("dynamic") else stored


def _is_linear(module: nn.Module, _name: str) -> bool:
    return type(module) is nn.Linear


def _is_modulation(module: nn.Module, name: str) -> bool:
    return _is_linear(module, name) and ".norm" in f".{name}"


def _is_projection(module: nn.Module, name: str) -> bool:
    return _is_linear(module, name) and ".norm" not in f".{name}"
