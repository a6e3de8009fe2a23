"""Smaller weights through bitsandbytes: 8 bits everywhere, or 4 bits in the language model alone.

Embeddings and the output layer stay as they are, and with 4 bits the vision tower too, which suffers most.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from lib import optional
from lib.errors import UserError

if TYPE_CHECKING:
    from lib.caption.model import CaptionModel

Quantization = Literal["8bit", "4bit"]
QUANTIZATIONS: tuple[Quantization, ...] = ("8bit", "4bit")


def check_quantization(given: str) -> Quantization | None:
    """What COGVIDEOX_QUANTIZATION asks for. Raises UserError for another word, and without bitsandbytes."""
    if not given or given == "none":
        return None
    if given not in QUANTIZATIONS:
        allowed = ", ".join([*QUANTIZATIONS, "none"])
        raise UserError(f"COGVIDEOX_QUANTIZATION={given} is unknown; allowed are {allowed}.")
    optional.require("bitsandbytes", for_setting=f"COGVIDEOX_QUANTIZATION={given}")
    return given


def available() -> bool:
    return optional.available("bitsandbytes")


def is_quantized(name: str, quantization: Quantization | None) -> bool:
    """Whether the weight called `name` (ours) gets smaller, given that it is a linear layer's."""
    inside = name.startswith("language.model.layers.")
    return inside or (name.startswith("vision.") and quantization == "8bit") if quantization else False


def quantize(
    model: "CaptionModel", name: str, weight: torch.Tensor, quantization: Quantization | None
) -> bool:
    """Put a linear layer with the quantised weight into the model, if this one is to be; whether it was."""
    place, _, parameter = name.rpartition(".")
    layer = model.get_submodule(place)
    if parameter != "weight" or not isinstance(layer, nn.Linear) or not is_quantized(name, quantization):
        return False
    parent, _, child = place.rpartition(".")
    setattr(model.get_submodule(parent), child, _layer(layer, weight, quantization))
    return True


def _layer(layer: nn.Linear, weight: torch.Tensor, quantization: Quantization) -> nn.Linear:
    import bitsandbytes as bnb

    size = (layer.in_features, layer.out_features)
    # Quantised when they move to the device; the bias, perhaps still to be loaded, comes after.
    if quantization == "4bit":
        small = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
        small.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    else:
        small = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=6.0)
        small.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    small = small.to(weight.device).eval()
    small.bias = layer.bias
    return small
