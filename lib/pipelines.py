"""A ready diffusers pipeline for a spec, a folder and this machine, with the memory plan it runs under."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lib import acceleration
from lib.acceleration import PLAIN, Acceleration
from lib.derived import weights_dtype
from lib.errors import UserError
from lib.models import ModelSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

Offload = Literal["resident", "model", "sequential"]
OFFLOADS: tuple[Offload, ...] = ("resident", "model", "sequential")
GIB = 2**30
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# VAE decoding in 16 bits takes at least 630 bytes per pixel of the whole clip (31.7 GB measured for 5B at
# 49x480x720, less 21.1 GB of weights) and more for larger frames: 1.5 at 81x768x1360 fails on 80 GB.
DECODE_BYTES_PER_PIXEL = 750
TILED_SHARE = 0.25
SEQUENTIAL_FLOOR = 5 * GIB  # stock sequential offload of 5B peaks there


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Where weights live between uses, and how the VAE decodes."""

    offload: Offload
    slicing: bool
    tiling: bool
    reason: str

    def __str__(self) -> str:
        vae = [name for name in ("slicing", "tiling") if getattr(self, name)]
        return f"{self.offload}, VAE {' and '.join(vae) or 'whole'} ({self.reason})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What setup found: device, free memory in bytes (0 on a CPU: system memory is not planned), dtype."""

    device: str
    free_bytes: int
    dtype: Literal["float16", "bfloat16", "float32"]


def inspect_machine(spec: ModelSpec) -> Machine:
    """CUDA if there is a GPU, with the checkpoint's dtype; else the CPU in float32."""
    import torch

    if not torch.cuda.is_available():
        return Machine(device="cpu", free_bytes=0, dtype="float32")
    free, _ = torch.cuda.mem_get_info()
    dtype = spec.dtype
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = "float16"
    return Machine(device="cuda", free_bytes=free, dtype=dtype)


def plan_memory(spec: ModelSpec, folder: Path, machine: Machine, *, forced: str | None = None) -> MemoryPlan:
    """Choose the fastest plan that fits the default clip into free memory.

    forced is COGVIDEOX_OFFLOAD; raises UserError when it is no plan's name.
    """
    if forced and forced not in OFFLOADS:
        raise UserError(f"COGVIDEOX_OFFLOAD={forced} is unknown; allowed are {', '.join(OFFLOADS)}.")
    if machine.device == "cpu":
        if forced and forced != "resident":
            raise UserError(f"COGVIDEOX_OFFLOAD={forced} needs a GPU; on this CPU only resident is possible.")
        return MemoryPlan(offload="resident", slicing=False, tiling=False, reason="CPU")
    sizes = component_bytes(folder, machine.dtype)
    decode = spec.frames * spec.height * spec.width * DECODE_BYTES_PER_PIXEL * BYTES[machine.dtype] // 2
    needs = {
        "resident": sum(sizes.values()),
        "model": max(sizes.values()),
        "sequential": min(SEQUENTIAL_FLOOR, max(sizes.values())),
    }
    room = 0.95 * machine.free_bytes
    free = f"{machine.free_bytes / GIB:.1f} GiB free"
    for offload in [forced] if forced else OFFLOADS:
        for tiling in (False, True):
            need = needs[offload] + decode * (TILED_SHARE if tiling else 1)
            if need <= room:
                reason = f"needs about {need / GIB:.1f} GiB, {free}"
                return MemoryPlan(offload=offload, slicing=tiling, tiling=tiling, reason=reason)
    reason = f"{free}, tight" + (", as COGVIDEOX_OFFLOAD asks" if forced else "")
    return MemoryPlan(offload=forced or "sequential", slicing=True, tiling=True, reason=reason)


def component_bytes(folder: Path, dtype: str) -> dict[str, int]:
    """Bytes each component's weights take in memory in dtype, from the sizes of its files."""
    return {
        part.name: sum(
            f.stat().st_size for f in part.glob("*.safetensors") if "." not in f.stem
        )  # no variants
        * BYTES[dtype]
        // BYTES[weights_dtype(part)]
        for part in sorted(folder.iterdir())
        if part.is_dir() and any(part.glob("*.safetensors"))
    }


def load_pipeline(
    spec: ModelSpec,
    folder: Path,
    machine: Machine,
    plan: MemoryPlan,
    *,
    text_encoder: bool = True,
    settings: Acceleration = PLAIN,
) -> "DiffusionPipeline":
    """Load a folder without touching the network and place it as planned, computing as `settings` say.

    Without its text encoder the pipeline takes embeddings only.
    """
    acceleration.prepare(settings)
    import diffusers
    import torch

    from lib import attention, convolution

    silence_libraries()
    left_out = {} if text_encoder else {"text_encoder": None, "tokenizer": None}
    pipeline = getattr(diffusers, spec.pipeline_class).from_pretrained(
        folder, dtype=getattr(torch, machine.dtype), local_files_only=True, use_safetensors=True, **left_out
    )
    pipeline.set_progress_bar_config(disable=True)
    _widen_grid(pipeline)
    attention.install(pipeline.transformer)
    if machine.device == "cpu":
        convolution.install(pipeline.vae)
    resident = plan.offload == "resident"
    acceleration.shrink(pipeline, settings, device=machine.device if resident else "cpu")
    if plan.slicing:
        pipeline.vae.enable_slicing()
    if plan.tiling:
        pipeline.vae.enable_tiling()
    if plan.offload == "resident":
        pipeline.to(machine.device)
        attention.fuse_projections(pipeline.transformer)
    elif plan.offload == "model":
        pipeline.enable_model_cpu_offload()
    else:
        pipeline.enable_sequential_cpu_offload()
    acceleration.hasten(pipeline.transformer, settings)
    return pipeline


def _widen_grid(pipeline: "DiffusionPipeline") -> None:
    """Let 1.5 make portraits: diffusers cuts its positions from a grid that some copies made 96x170.

    A larger grid begins with the same positions; the weights know nothing of its end.
    """
    config = pipeline.transformer.config
    if config.get("patch_size_t") is not None:
        side = max(config.sample_height, config.sample_width)
        pipeline.transformer.register_to_config(sample_height=side, sample_width=side)


def silence_libraries() -> None:
    """No bars and warnings of diffusers and transformers: what the caller should know is reported by us."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def build_scheduler(name: Literal["default", "ddim", "dpm"], original: "SchedulerMixin") -> "SchedulerMixin":
    """The checkpoint's own scheduler, or CogVideoX's DDIM or DPM with its settings and trailing timesteps."""
    if name == "default":
        return original
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    kind = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[name]
    return kind.from_config(original.config, timestep_spacing="trailing")
