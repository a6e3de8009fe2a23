"""How a server computes, settled once at its start: attention kernel, compiled blocks, quantised weights.

    settings = settle(machine)                  # from COGVIDEOX_ATTENTION, _COMPILE and _QUANTIZATION
    prepare(settings)                           # before diffusers is imported
    shrink(pipeline, settings, device="cpu")    # before the weights are placed, and so is this:
    hasten(pipeline.transformer, settings)
    print(settings)                             # attention native, compiled, weights in int8

Requests know nothing of it; LoRAs are attached to the result like to any other transformer.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lib import optional
from lib.errors import UserError
from lib.pipelines.quantization import QUANTIZATIONS, Quantization

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline

    from lib.memory.plan import MemoryPlan
    from lib.pipelines.machine import Machine

Attention = Literal["native", "cudnn", "flash", "flash3", "sage"]
Capability = tuple[int, int]
"""A GPU's compute capability, such as (9, 0) for Hopper."""
HOPPER: Capability = (9, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What an attention kernel needs, and what diffusers calls it."""

    backend: str
    least: Capability | None = None
    """None: runs on a CPU too."""
    most: Capability | None = None
    package: str | None = None
    install: str | None = None
    shares: bool = True
    """Whether diffusers can share the sequence among GPUs with it."""


KERNELS: dict[Attention, Kernel] = {
    "native": Kernel(backend="native"),
    "cudnn": Kernel(backend="_native_cudnn", least=(8, 0)),
    "flash": Kernel(backend="flash", least=(8, 0), package="flash_attn", install="flash-attn"),
    # Its kernels are Hopper's own; what it is installed as has no place on PyPI.
    "flash3": Kernel(
        backend="_flash_3", least=HOPPER, most=HOPPER, package="flash_attn_interface", shares=False
    ),
    # With query and key in 8 bits: the only one that computes less exactly.
    "sage": Kernel(backend="sage", least=(8, 0), package="sageattention"),
}
PREFERRED: tuple[Attention, ...] = ("flash3", "cudnn")
"""By `auto`, on Hopper and later, whose speed PyTorch's own choice does not reach; elsewhere it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Acceleration:
    """What was settled."""

    attention: Attention = "native"
    compiled: bool = False
    quantization: Quantization = "none"

    def __str__(self) -> str:
        weights = "" if self.quantization == "none" else f", weights in {self.quantization}"
        return f"attention {self.attention}{', compiled' if self.compiled else ''}{weights}"

    @property
    def weights(self) -> Literal["none", "int8", "fp8"]:
        """How the weights are stored, whatever the products are computed in."""
        return {"int8": "int8", "fp8": "fp8"}.get(self.quantization.removesuffix("-dynamic"), "none")

    def facts(self) -> dict[str, object]:
        """For each request's metrics."""
        return {
            "attention": self.attention,
            "compiled": self.compiled,
            "quantization": self.quantization,
        }


PLAIN = Acceleration()


def settle(machine: "Machine", environment: Mapping[str, str] = os.environ) -> Acceleration:
    """What COGVIDEOX_ATTENTION, COGVIDEOX_COMPILE and COGVIDEOX_QUANTIZATION ask for.

    Loads nothing. Raises UserError for what is unknown, what this device cannot do, and what is not
    installed.
    """
    capability = device_capability(machine.device)
    return Acceleration(
        attention=settle_attention(
            environment.get("COGVIDEOX_ATTENTION", ""),
            capability,
            machine.dtype,
            shared=_shares_clips(capability, environment),
        ),
        compiled=settle_compile(environment.get("COGVIDEOX_COMPILE", ""), machine.device),
        quantization=settle_quantization(environment.get("COGVIDEOX_QUANTIZATION", ""), capability),
    )


def device_capability(device: str) -> Capability | None:
    """Of the GPU; None for a CPU."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.get_device_capability()


def settle_attention(
    asked: str, capability: Capability | None, dtype: str, *, shared: bool = False
) -> Attention:
    """The kernel as asked for; for "" and "auto" the fastest of the exact ones that this GPU has.

    `shared`: whether GPUs share clips, which not every kernel can.
    """
    if asked in ("", "auto"):
        return _fastest(capability, dtype, shared=shared)
    if asked not in KERNELS:
        allowed = ", ".join(["auto", *KERNELS])
        raise UserError(f"COGVIDEOX_ATTENTION={asked} is unknown; allowed are {allowed}.")
    kernel, setting = KERNELS[asked], f"COGVIDEOX_ATTENTION={asked}"
    if kernel.least is None:
        return asked
    if not _runs_on(kernel, capability):
        exactly = " exactly" if kernel.most else ""
        raise UserError(
            f"{setting} needs a GPU of compute capability {_dotted(kernel.least)}{exactly or ' or more'}; "
            f"{_named(capability)}. auto, or leaving it out, chooses what it can do."
        )
    if dtype == "float32":
        raise UserError(f"{setting} computes in 16 bits only, and this model runs in float32.")
    if shared and not kernel.shares:
        raise UserError(
            f"{setting} cannot share a clip among GPUs: choose cudnn, or set COGVIDEOX_PARALLEL=off."
        )
    if kernel.package:
        if asked == "flash3" and not optional.available(kernel.package):
            raise UserError(
                f"{setting} needs FlashAttention 3 (flash_attn_interface), which is not installed: it is "
                "built from the hopper folder of FlashAttention's repository."
            )
        optional.require(kernel.package, for_setting=setting, install=kernel.install)
    return asked


def settle_compile(asked: str, device: str) -> bool:
    """Whether to compile. Raises UserError for a word that is none, and without a compiler."""
    if asked not in ("", "0", "1"):
        raise UserError(f"COGVIDEOX_COMPILE={asked} is unknown; allowed are 0 and 1.")
    if asked != "1":
        return False
    from lib.pipelines.compilation import missing_tool

    missing = missing_tool(device)
    if missing:
        raise UserError(f"COGVIDEOX_COMPILE=1 needs {missing}, or leave it out.")
    return True


def settle_quantization(asked: str, capability: Capability | None) -> Quantization:
    """The kind of weights. Raises UserError for another word, the wrong device, and without torchao."""
    if asked in ("", "none"):
        return "none"
    if asked not in QUANTIZATIONS:
        allowed = ", ".join(QUANTIZATIONS)
        raise UserError(f"COGVIDEOX_QUANTIZATION={asked} is unknown; allowed are {allowed}.")
    setting = f"COGVIDEOX_QUANTIZATION={asked}"
    if asked == "fp8-dynamic" and (capability is None or capability < (8, 9)):
        raise UserError(
            f"{setting} needs a GPU of compute capability 8.9 or more; {_named(capability)}. "
            "fp8 stores weights the same way and computes as before; int8-dynamic computes in 8 bits."
        )
    optional.require("torchao", for_setting=setting)
    return asked


def prepare(settings: Acceleration) -> None:
    """Import PyTorch's compiler if it will be used: diffusers is otherwise imported without it.

    To be called before diffusers is imported, which imports torchao where it is installed.
    """
    if settings.compiled:
        from lib.pipelines.compilation import keep_compilations

        keep_compilations()  # the compiler settles on a folder when it is imported
    if settings.compiled or settings.quantization != "none":
        import torch._dynamo  # noqa: F401
    if settings.quantization != "none":
        from lib.pipelines.quantization import silence_torchao

        silence_torchao()


def check_plan(settings: Acceleration, plan: "MemoryPlan") -> None:
    """Raise UserError where the memory plan does not go with what was asked for."""
    if plan.offload == "sequential":
        for wanted, name, reason in (
            (settings.compiled, "COGVIDEOX_COMPILE=1", "it brings the layers of a compiled block one by one"),
            (
                settings.weights != "none",
                f"COGVIDEOX_QUANTIZATION={settings.quantization}",
                "it cannot move them",
            ),
        ):
            if wanted:
                raise UserError(
                    f"{name} does not go with the memory plan sequential ({plan.reason}): {reason}. Leave it "
                    "out, or set COGVIDEOX_OFFLOAD=group."
                )


def shrink(pipeline: "DiffusionPipeline", settings: Acceleration, *, device: str) -> None:
    """Quantise a pipeline's transformer and text encoder on `device`, where these weights then are."""
    if settings.quantization != "none":
        from lib.pipelines.quantization import quantize_pipeline

        quantize_pipeline(pipeline, settings.quantization, device=device)


def hasten(transformer: "CogVideoXTransformer3DModel", settings: Acceleration) -> None:
    """Choose the attention kernel and compile the blocks of a transformer with our attention installed.

    Of this transformer alone: diffusers' own way to choose a kernel also sets it for the whole process.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    backend = AttentionBackendName(KERNELS[settings.attention].backend)
    for processor in transformer.attn_processors.values():
        processor._attention_backend = backend
    if settings.compiled:
        from lib.pipelines.compilation import compile_blocks

        compile_blocks(transformer)


def _shares_clips(capability: Capability | None, environment: Mapping[str, str]) -> bool:
    """Whether this server, on a GPU, will start processes on further ones."""
    if capability is None or environment.get("COGVIDEOX_PARALLEL", "").strip().lower() in ("off", "0", "1"):
        return False
    import torch

    return torch.cuda.device_count() > 1


def _fastest(capability: Capability | None, dtype: str, *, shared: bool) -> Attention:
    if capability is None or capability < HOPPER or dtype == "float32":
        return "native"
    for name in PREFERRED:
        kernel = KERNELS[name]
        if shared and not kernel.shares:
            continue
        if _runs_on(kernel, capability) and (kernel.package is None or optional.available(kernel.package)):
            return name
    return "native"


def _runs_on(kernel: Kernel, capability: Capability | None) -> bool:
    if kernel.least is None:
        return True
    return capability is not None and kernel.least <= capability <= (kernel.most or capability)


def _named(capability: Capability | None) -> str:
    return "this is a CPU" if capability is None else f"this one has {_dotted(capability)}"


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
