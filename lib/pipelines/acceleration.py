"""How a server computes, resolved once at its start: attention backend, compiled blocks, quantized weights.

    acceleration = resolve(machine, settings.current())
    print(acceleration)                     # attention native, compiled, weights in int8
    pipeline = load_pipeline(spec, folder, machine, acceleration=acceleration)

Requests change nothing of it; LoRAs are attached to the result as to any other transformer.
"""

from dataclasses import dataclass

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName

from lib import optional
from lib.errors import UserError
from lib.pipelines.attention import processors
from lib.pipelines.compilation import missing_tool
from lib.pipelines.machine import Machine
from lib.pipelines.quantization import QUANTIZATIONS, StoredWeights, stored_weights
from lib.settings import Attention, Offload, Quantization, Settings

Capability = tuple[int, int]
"""A GPU's compute capability, such as (9, 0) for Hopper."""
HOPPER: Capability = (9, 0)
FP8_CAPABILITY: Capability = (8, 9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """Requirements of an attention backend, and its name in diffusers."""

    diffusers_name: str
    min_capability: Capability | None = None
    """None: also runs on a CPU."""
    max_capability: Capability | None = None
    package: str | None = None
    install: str | None = None
    context_parallel: bool = True
    """Whether diffusers can share the sequence among GPUs with it."""


BACKENDS: dict[Attention, Backend] = {
    "native": Backend(diffusers_name="native"),
    "cudnn": Backend(diffusers_name="_native_cudnn", min_capability=(8, 0)),
    "flash": Backend(
        diffusers_name="flash", min_capability=(8, 0), package="flash_attn", install="flash-attn"
    ),
    # Its kernels are for Hopper only, and its package is not on PyPI.
    "flash3": Backend(
        diffusers_name="_flash_3",
        min_capability=HOPPER,
        max_capability=HOPPER,
        package="flash_attn_interface",
        context_parallel=False,
    ),
    # With query and key in 8 bits: the only one that is less exact.
    "sage": Backend(diffusers_name="sage", min_capability=(8, 0), package="sageattention"),
}
PREFERRED: tuple[Attention, ...] = ("flash3", "cudnn")
"""Backends that `auto` tries on Hopper and later; on older GPUs PyTorch's own choice is as fast."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Acceleration:
    """Attention backend, compilation and quantization of one server."""

    attention: Attention = "native"
    compiled: bool = False
    quantization: Quantization = "none"

    def __str__(self) -> str:
        weights = "" if self.quantization == "none" else f", weights in {self.quantization}"
        return f"attention {self.attention}{', compiled' if self.compiled else ''}{weights}"

    @property
    def weights(self) -> StoredWeights:
        """How the weights are stored."""
        return stored_weights(self.quantization)

    def facts(self) -> dict[str, object]:
        """Return what each request's metrics contain."""
        return {
            "attention": self.attention,
            "compiled": self.compiled,
            "quantization": self.quantization,
        }


PLAIN = Acceleration()


def resolve(machine: Machine, settings: Settings) -> Acceleration:
    """Return what the settings ask for, checked against this machine. Loads nothing.

    Raises UserError for what this device cannot do and what is not installed.
    """
    capability = None if machine.device == "cpu" else torch.cuda.get_device_capability()
    return Acceleration(
        attention=resolve_attention(
            settings.attention, capability, machine.dtype, shared=_shares_clips(machine, settings)
        ),
        compiled=resolve_compile(settings.compile, machine.device),
        quantization=resolve_quantization(settings.quantization, capability),
    )


def resolve_attention(
    requested: Attention, capability: Capability | None, dtype: str, *, shared: bool = False
) -> Attention:
    """Return the requested backend; for "auto" the fastest exact one that this GPU has.

    Args:
        requested: The value of COGVIDEOX_ATTENTION.
        capability: The GPU's, None for a CPU.
        dtype: Type that the model computes in.
        shared: Whether GPUs share clips, which not every backend can.

    Raises:
        UserError: The machine cannot run the requested backend.
    """
    if requested == "auto":
        return _fastest(capability, dtype, shared=shared)
    backend, setting = BACKENDS[requested], f"COGVIDEOX_ATTENTION={requested}"
    if backend.min_capability is None:
        return requested
    if not _runs_on(backend, capability):
        range_ = "exactly" if backend.max_capability else "or more"
        raise UserError(
            f"{setting} needs a GPU of compute capability {_dotted(backend.min_capability)} {range_}; "
            f"{_describe(capability)}. Set auto, or leave it out, to use what this machine can do."
        )
    if dtype == "float32":
        raise UserError(f"{setting} computes in 16 bits only, and this model runs in float32.")
    if shared and not backend.context_parallel:
        raise UserError(
            f"{setting} cannot share a clip among GPUs: choose cudnn, or set COGVIDEOX_PARALLEL=off."
        )
    if requested == "flash3" and not optional.available("flash_attn_interface"):
        raise UserError(
            f"{setting} needs FlashAttention 3 (flash_attn_interface), which is not installed: it is built "
            "from the hopper folder of FlashAttention's repository."
        )
    if backend.package:
        optional.require(backend.package, for_setting=setting, install=backend.install)
    return requested


def resolve_compile(requested: bool, device: str) -> bool:
    """Return whether to compile. Raises UserError where a compiler is missing."""
    if requested and (missing := missing_tool(device)):
        raise UserError(f"COGVIDEOX_COMPILE=1 needs {missing}, or leave it out.")
    return requested


def resolve_quantization(requested: Quantization | None, capability: Capability | None) -> Quantization:
    """Return how to store the weights. Raises UserError for the wrong device, and without torchao."""
    if requested in (None, "none"):
        return "none"
    setting = f"COGVIDEOX_QUANTIZATION={requested}"
    if requested not in QUANTIZATIONS:
        raise UserError(f"{setting} is for captions only; for video use {', '.join(QUANTIZATIONS)}.")
    if requested == "fp8-dynamic" and (capability is None or capability < FP8_CAPABILITY):
        raise UserError(
            f"{setting} needs a GPU of compute capability {_dotted(FP8_CAPABILITY)} or more; "
            f"{_describe(capability)}. fp8 stores weights the same way and computes as before; int8-dynamic "
            "computes in 8 bits."
        )
    optional.require("torchao", for_setting=setting)
    return requested


def check_offload(acceleration: Acceleration, offload: Offload, reason: str) -> None:
    """Raise UserError where a memory plan, chosen for `reason`, cannot be combined with the acceleration."""
    if offload != "sequential":
        return
    for requested, setting, obstacle in (
        (acceleration.compiled, "COGVIDEOX_COMPILE=1", "it loads the layers of a compiled block one by one"),
        (
            acceleration.quantization != "none",
            f"COGVIDEOX_QUANTIZATION={acceleration.quantization}",
            "it cannot move quantized weights",
        ),
    ):
        if requested:
            raise UserError(
                f"{setting} cannot be combined with the memory plan sequential ({reason}): {obstacle}. "
                "Leave it out, or set COGVIDEOX_OFFLOAD=group."
            )


def set_attention_backend(transformer: CogVideoXTransformer3DModel, attention: Attention) -> None:
    """Set the backend of this transformer, which has our attention installed.

    diffusers' own set_attention_backend would also set it for the whole process.
    """
    backend = AttentionBackendName(BACKENDS[attention].diffusers_name)
    for processor in processors(transformer):
        processor._attention_backend = backend


def _shares_clips(machine: Machine, settings: Settings) -> bool:
    """Whether this server, on a GPU, will start processes on further ones."""
    if machine.device == "cpu" or settings.parallel in ("off", "0", "1"):
        return False
    return torch.cuda.device_count() > 1


def _fastest(capability: Capability | None, dtype: str, *, shared: bool) -> Attention:
    if capability is None or capability < HOPPER or dtype == "float32":
        return "native"
    for name in PREFERRED:
        backend = BACKENDS[name]
        if shared and not backend.context_parallel:
            continue
        installed = backend.package is None or optional.available(backend.package)
        if installed and _runs_on(backend, capability):
            return name
    return "native"


def _runs_on(backend: Backend, capability: Capability | None) -> bool:
    if backend.min_capability is None:
        return True
    if capability is None:
        return False
    return backend.min_capability <= capability <= (backend.max_capability or capability)


def _describe(capability: Capability | None) -> str:
    return "this is a CPU" if capability is None else f"this one has {_dotted(capability)}"


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
