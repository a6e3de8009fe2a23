"""How a captioning model is loaded on this machine: device, dtype, and linear layers quantized or not.

Quantization is bitsandbytes': int8 for all linear layers but the output layer, int4 (NF4) for those of the
language model alone, as the vision tower loses most.
"""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import nn

from lib import optional
from lib.caption.config import CaptionConfig
from lib.caption.model import CaptionModel
from lib.errors import UserError
from lib.pipelines.machine import Machine
from lib.settings import Dtype, current

Quantization = Literal["none", "int8", "int4"]

GIB = 1 << 30
WORKING_BYTES = 3 * GIB
"""Memory for a clip of 24 frames in addition to the weights: the vision tower's activations, the KV cache."""
CPU_SHARE = 0.7
"""Largest share of the free system memory for float32 weights; larger models are loaded in bfloat16."""
QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5 + 4 / 64}
"""Bytes per value, including the scales of int4 (a float32 for 64 values)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """The chosen precision, and why."""

    device: Literal["cpu", "cuda"]
    dtype: Dtype
    quantization: Quantization
    reason: str

    def __str__(self) -> str:
        weights = "" if self.quantization == "none" else f", weights in {self.quantization}"
        return f"{self.device} in {self.dtype}{weights} ({self.reason})"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def choose_precision(config: CaptionConfig, machine: Machine) -> Precision:
    """Choose from the free memory, COGVIDEOX_DTYPE and COGVIDEOX_QUANTIZATION.

    On a GPU the machine's 16-bit dtype; if that does not fit, quantization is unset and bitsandbytes is
    installed, int8. On a CPU float32 if it fits, otherwise bfloat16. Raises UserError for a quantization that
    captioning does not support, and if the model does not fit on the GPU.
    """
    settings = current()
    quantization = _requested(settings.quantization)
    free = machine.free_bytes or 0
    if machine.device == "cpu":
        full = weight_bytes(config, "float32", "none")
        dtype = settings.dtype or ("float32" if full < max(GIB, CPU_SHARE * free) else "bfloat16")
        need = weight_bytes(config, dtype, quantization)
        reason = "CPU" if need < GIB else _room(need, free)
        return Precision(device="cpu", dtype=dtype, quantization=quantization, reason=reason)
    dtype = settings.dtype or machine.dtype
    need = weight_bytes(config, dtype, quantization) + WORKING_BYTES
    if need > free and settings.quantization is None and optional.available("bitsandbytes"):
        quantization = "int8"
        need = weight_bytes(config, dtype, quantization) + WORKING_BYTES
    if need > free:
        smaller = weight_bytes(config, dtype, "int8") + WORKING_BYTES
        remedy = (
            "Use a larger GPU."
            if quantization == "int8" or smaller > free
            else f"COGVIDEOX_QUANTIZATION=int8 needs {smaller / GIB:.1f} GiB, and bitsandbytes installed."
        )
        raise UserError(f"this model {_room(need, free)}. {remedy}")
    return Precision(device="cuda", dtype=dtype, quantization=quantization, reason=_room(need, free))


def weight_bytes(config: CaptionConfig, dtype: Dtype, quantization: Quantization) -> int:
    """Return how much memory the weights take."""
    with torch.device("meta"):
        model = CaptionModel(config)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    total = 0.0
    for name, tensor in model.state_dict().items():
        quantized = name in linear and is_quantized(name, quantization)
        each = QUANTIZED_BYTES[quantization] if quantized else getattr(torch, dtype).itemsize
        total += tensor.numel() * each
    return int(total)


def is_quantized(name: str, quantization: Quantization) -> bool:
    """Return whether the linear layer with the weight `name` (as in CaptionModel) is quantized."""
    if quantization == "none":
        return False
    in_vision = name.startswith("vision.") and quantization == "int8"
    return in_vision or name.startswith("language.model.layers.")


def set_quantized(model: CaptionModel, name: str, weight: torch.Tensor, quantization: Quantization) -> bool:
    """Replace the layer of the weight `name` by a quantized one, if it is to be; return whether it was."""
    path, _, parameter = name.rpartition(".")
    layer = model.get_submodule(path)
    if parameter != "weight" or not isinstance(layer, nn.Linear) or not is_quantized(name, quantization):
        return False
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, _quantized_layer(layer, weight, quantization))
    return True


def _quantized_layer(layer: nn.Linear, weight: torch.Tensor, quantization: Quantization) -> nn.Module:
    import bitsandbytes as bnb  # optional package

    # bitsandbytes quantizes when a layer moves to its device; the bias, which may load later, is set after.
    size = (layer.in_features, layer.out_features)
    if quantization == "int4":
        small = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
        small.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    else:
        small = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=6.0)
        small.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    small = small.to(weight.device).eval()
    small.bias = layer.bias
    return small


def _requested(quantization: str | None) -> Quantization:
    allowed = get_args(Quantization)
    if quantization is None or quantization == "none":
        return "none"
    if quantization not in allowed:
        raise UserError(
            f"COGVIDEOX_QUANTIZATION={quantization} is not supported for captioning: "
            f"use {', '.join(allowed)}."
        )
    optional.require("bitsandbytes", for_setting=f"COGVIDEOX_QUANTIZATION={quantization}")
    return cast("Quantization", quantization)


def _room(need: int, free: int) -> str:
    return f"needs about {need / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
