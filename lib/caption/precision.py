"""How a captioning model is loaded on this machine: device, type of its weights, quantised or not."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lib.caption.config import CaptionConfig
from lib.caption.quantization import Quantization, available, check_quantization
from lib.errors import UserError
from lib.memory.model import GIB, ITEMSIZE
from lib.pipelines.machine import Machine

if TYPE_CHECKING:
    import torch

WORKING_BYTES = 3 * GIB
"""Beside the weights, for a clip of 24 frames: the vision tower's activations, the language model's cache."""
CPU_SHARE = 0.7
"""Of the free system memory that float32 weights may take; above it they are bfloat16."""
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """What setup settled."""

    device: str
    dtype: str
    quantization: Quantization | None
    reason: str

    def __str__(self) -> str:
        weights = f", weights in {self.quantization}" if self.quantization else ""
        return f"{self.device} in {self.dtype}{weights} ({self.reason})"

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.dtype)


def choose_precision(config: CaptionConfig, machine: Machine) -> Precision:
    """Settle it from the free memory, COGVIDEOX_DTYPE and COGVIDEOX_QUANTIZATION (8bit, 4bit, none).

    On a GPU the machine's 16-bit type; where that does not fit and nothing was asked for, 8 bits if
    bitsandbytes is there. On a CPU float32 where it fits, else bfloat16. Raises UserError for an unknown
    word, and when the model does not fit.
    """
    asked = os.environ.get("COGVIDEOX_DTYPE", "")
    if asked and asked not in DTYPES:
        raise UserError(f"COGVIDEOX_DTYPE={asked} is unknown; allowed are {', '.join(DTYPES)}.")
    given = os.environ.get("COGVIDEOX_QUANTIZATION", "")
    quantization = check_quantization(given)
    if machine.device == "cpu":
        free = _free_system_bytes()
        dtype = asked or (
            "float32" if weight_bytes(config, "float32", None) < CPU_SHARE * free else "bfloat16"
        )
        need = weight_bytes(config, dtype, quantization)
        reason = "CPU" if need < GIB else _room(need, free)
        return Precision(device="cpu", dtype=dtype, quantization=quantization, reason=reason)
    dtype = asked or machine.dtype
    need = weight_bytes(config, dtype, quantization) + WORKING_BYTES
    if need > machine.free_bytes and not given and available():
        quantization = "8bit"
        need = weight_bytes(config, dtype, quantization) + WORKING_BYTES
    if need > machine.free_bytes:
        smaller = weight_bytes(config, dtype, "8bit") + WORKING_BYTES
        remedy = f"COGVIDEOX_QUANTIZATION=8bit needs {smaller / GIB:.1f} GiB, and bitsandbytes installed"
        raise UserError(
            f"this model {_room(need, machine.free_bytes)}. "
            + (
                "Use a larger GPU."
                if quantization == "8bit" or smaller > machine.free_bytes
                else f"{remedy}."
            )
        )
    return Precision(
        device=machine.device, dtype=dtype, quantization=quantization, reason=_room(need, machine.free_bytes)
    )


def weight_bytes(config: CaptionConfig, dtype: str, quantization: Quantization | None) -> int:
    """Bytes of the weights in memory: 1 a quantised value with 8 bits, with 4 bits 0.56 (scales included)."""
    import torch

    from lib.caption.model import CaptionModel
    from lib.caption.quantization import is_quantized

    with torch.device("meta"):
        model = CaptionModel(config)
    small = {"8bit": 1.0, "4bit": 0.5 + 4 / 64, None: 0.0}[quantization]
    linear = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    total = 0.0
    for name, tensor in model.state_dict().items():
        shrinks = name in linear and is_quantized(name, quantization)
        total += tensor.numel() * (small if shrinks else ITEMSIZE[dtype])
    return int(total)


def _room(need: int, free: int) -> str:
    return f"needs about {need / GIB:.1f} GiB, {free / GIB:.1f} GiB free"


def _free_system_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
