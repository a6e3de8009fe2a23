"""Smaller weights of a video model through torchao: the linear layers of the transformer and of T5.

Only those of their blocks: embeddings, norms, positions and what leads into and out of the transformer are
small and suffer most. "int8" and "fp8" store weights in 8 bits, with a scale for each output, and compute as
before. The dynamic kinds also round what comes in, so that the product itself is done in 8 bits; only where
this gains time: in the transformer, not in its modulations (one row per clip) and not in T5.
"""

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

Quantization = Literal["none", "int8", "int8-dynamic", "fp8", "fp8-dynamic"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


def quantize_pipeline(pipeline: "DiffusionPipeline", kind: Quantization, *, device: str) -> None:
    """Replace the weights, layer by layer: no part is ever there twice.

    Each layer is quantised on `device` and stays there. Lasts as long as the pipeline; not to be done twice.
    """
    from torchao.quantization import quantize_

    stored, computed = _configs(kind)
    blocks = pipeline.transformer.transformer_blocks
    quantize_(blocks, stored, filter_fn=_is_modulation, device=device)
    quantize_(blocks, computed, filter_fn=_is_product, device=device)
    if pipeline.text_encoder is not None:
        quantize_(pipeline.text_encoder.encoder.block, stored, filter_fn=_is_linear, device=device)


def silence_torchao() -> None:
    """No warnings about kernels for other machines, and about merging LoRAs, which is not done here."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")


def _configs(kind: Quantization) -> tuple[Any, Any]:
    """torchao's settings for weights that are only stored so, and for products that are computed so."""
    from torchao import quantization as torchao

    # They would set torch's precision and inductor's options for the whole process.
    apart = {"set_inductor_config": False}
    if kind.startswith("int8"):
        stored = torchao.Int8WeightOnlyConfig(**apart)
        dynamic = torchao.Int8DynamicActivationInt8WeightConfig
    else:
        stored = torchao.Float8WeightOnlyConfig(**apart)
        dynamic = torchao.Float8DynamicActivationFloat8WeightConfig
    return stored, dynamic(**apart) if kind.endswith("dynamic") else stored


def _is_linear(module: "nn.Module", _name: str) -> bool:
    from torch import nn

    return type(module) is nn.Linear


def _is_modulation(module: "nn.Module", name: str) -> bool:
    return _is_linear(module, name) and ".norm" in f".{name}"


def _is_product(module: "nn.Module", name: str) -> bool:
    return _is_linear(module, name) and ".norm" not in f".{name}"
