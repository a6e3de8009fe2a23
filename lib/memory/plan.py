"""Choose the offload plan for a model on a machine, and check that a request fits it.

plan = plan_memory(spec, folder, machine)
plan.tiled(clip)        # for each request: whether to decode in tiles; UserError when it cannot fit
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from lib.errors import UserError
from lib.memory.configs import ModelConfigs
from lib.memory.model import GIB, OFFLOADS, MemoryModel, Weights, released, usual_clip
from lib.memory.stages import Clip
from lib.models.specs import ModelSpec
from lib.pipelines.machine import Machine
from lib.settings import Offload

USABLE = 0.95
"""Share of the free memory that may be used."""
GPU_RESERVE = 2**28
"""Workspaces of cuBLAS and cuDNN, and modules that CUDA loads at their first use."""
FRAGMENTS = 0.1
"""Share of a stage's tensors, without weights, that PyTorch's allocator on a GPU loses to gaps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Where weights are while they are not used, and how much memory there is."""

    offload: Offload
    tiling: bool
    """Whether the usual clip is decoded in tiles."""
    need: int
    """Predicted bytes for the usual clip."""
    room: int | None
    """Bytes that may be used; None when unknown."""
    memory: MemoryModel
    spec: ModelSpec
    reason: str
    frames: int | None = None
    """The longest clip of the usual size that fits, where the usual one does not."""

    def __str__(self) -> str:
        return f"{self.offload}, VAE {'in tiles' if self.tiling else 'untiled'} ({self.reason})"

    def tiled(self, clip: Clip, *, lora_bytes: int = 0) -> bool:
        """Return whether to decode in tiles: only when the clip does not fit untiled.

        Raises UserError when it does not fit at all, with what would fit.
        """
        if self.room is None:
            return self.tiling
        for tiled in (False, True):
            if _fits(needed(self.memory, clip, self.offload, tiled=tiled, lora_bytes=lora_bytes), self.room):
                return tiled
        raise UserError(_refusal(self, clip, lora_bytes))


def needed(memory: MemoryModel, clip: Clip, offload: Offload, *, tiled: bool, lora_bytes: int = 0) -> int:
    """Return the bytes that have to be free: for the highest of the stages, with what is not a tensor."""
    peaks = memory.peaks(clip, offload, tiled=tiled, lora_bytes=lora_bytes)
    if memory.device == "cpu":
        return max(peaks.values())
    weights = memory.weights_on_device(offload, lora_bytes)
    return max(int(peak + FRAGMENTS * (peak - weights[stage])) for stage, peak in peaks.items()) + GPU_RESERVE


def plan_memory(
    spec: ModelSpec,
    folder: Path,
    machine: Machine,
    *,
    forced: Offload | None = None,
    weights: Weights = "none",
) -> MemoryPlan:
    """Return the plan for the model in a folder, its weights stored as given; otherwise as choose_plan."""
    return choose_plan(spec, MemoryModel.of(spec, folder, machine, weights=weights), machine, forced=forced)


def choose_plan(
    spec: ModelSpec, memory: MemoryModel, machine: Machine, *, forced: Offload | None = None
) -> MemoryPlan:
    """Return the fastest plan that fits the usual clip: untiled if any plan allows that, else in tiles.

    Where only a shorter clip fits, the plan is for that one, and longer ones are refused on request. `forced`
    is COGVIDEOX_OFFLOAD: that plan is taken even if memory is tight. Raises UserError when no clip fits.
    """
    cpu = machine.device == "cpu"
    if cpu and forced not in (None, "resident"):
        raise UserError(f"COGVIDEOX_OFFLOAD={forced} needs a GPU; on this CPU only resident is possible.")
    room = int(USABLE * machine.free_bytes) if machine.free_bytes else None
    offloads: Sequence[Offload] = _possible(memory, machine)
    if cpu or forced:
        offloads = [forced or "resident"]
    free = f", {machine.free_bytes / GIB:.1f} GiB free" if machine.free_bytes else ""
    usual = usual_clip(spec)
    plan = partial(MemoryPlan, spec=spec, memory=memory, room=room)
    for clip in (usual, *shorter(spec, usual)):
        for tiled, offload in product((False, True), offloads):
            need = needed(memory, clip, offload, tiled=tiled)
            if not _fits(need, room):
                continue
            frames = None if clip == usual else clip.frames
            length = f" for {frames} frames, the most that fit" if frames else ""
            reason = f"needs about {need / GIB:.1f} GiB{length}{free}"
            return plan(offload=offload, tiling=tiled, need=need, reason=reason, frames=frames)
    last = plan(offload=offloads[-1], tiling=True, need=0, reason="")
    if not forced:
        raise UserError(_refusal(last, usual, 0))
    need = needed(memory, usual, last.offload, tiled=True)
    reason = f"needs about {need / GIB:.1f} GiB{free}, tight, as COGVIDEOX_OFFLOAD asks"
    return replace(last, room=None, need=need, reason=reason)


def shorter(spec: ModelSpec, clip: Clip) -> list[Clip]:
    """Return clips of the same size with fewer frames, the longest first."""
    lengths = range(spec.frame_step + 1, clip.frames, spec.frame_step)
    return [replace(clip, frames=frames) for frames in reversed(lengths)]


def _fits(need: int, room: int | None) -> bool:
    return room is None or need <= room


def _possible(memory: MemoryModel, machine: Machine) -> list[Offload]:
    """Return the plans whose offloaded weights fit into system memory; all if its size is unknown.

    Quantized weights cannot be moved layer by layer.
    """
    system = machine.system_bytes
    return [
        name
        for name in OFFLOADS
        if (system is None or memory.offloaded_bytes(name) <= USABLE * system)
        and not (name == "sequential" and memory.weights != "none")
    ]


def _refusal(plan: MemoryPlan, clip: Clip, lora_bytes: int) -> str:
    """Return what is needed, what is available, and what would fit."""
    spec, memory, room = plan.spec, plan.memory, plan.room or 0
    least = needed(memory, clip, plan.offload, tiled=True, lora_bytes=lora_bytes)
    kind = "system memory" if memory.device == "cpu" else "GPU memory"
    text = (
        f"num_frames={clip.frames} at {clip.width}x{clip.height} needs about {least / GIB:.1f} GiB of {kind} "
        f"with {memory.name} ({plan.offload}, VAE in tiles), and {room / GIB:.1f} GiB can be used."
    )
    advice = []
    fitting = next(
        (
            other.frames
            for other in shorter(spec, clip)
            if _fits(needed(memory, other, plan.offload, tiled=True, lora_bytes=lora_bytes), room)
        ),
        None,
    )
    if fitting:
        advice.append(f"At this size up to num_frames={fitting} fits.")
    if clip.guided and _fits(needed(memory, replace(clip, guided=False), plan.offload, tiled=True), room):
        advice.append("guidance_scale=1 fits.")
    if memory.weights == "none" and memory.device == "cuda":
        smaller = replace(memory, weights="int8")
        if _fits(needed(smaller, clip, plan.offload, tiled=True, lora_bytes=lora_bytes), room):
            advice.append("COGVIDEOX_QUANTIZATION=int8 makes it fit.")
    if others := _models_that_fit(plan):
        advice.append(f"COGVIDEOX_MODEL={' or '.join(others)} fits.")
    return " ".join([text, *(advice or ["No released model fits either; more memory is needed."])])


def _models_that_fit(plan: MemoryPlan) -> list[str]:
    """Return released models for the same task whose usual clip fits under the same plan."""
    memories = {
        spec: replace(plan.memory, name=spec.name, configs=ModelConfigs.from_spec(spec))
        for spec in released(plan.spec.task)
        if spec.name != plan.spec.name
    }
    return [
        spec.name
        for spec, memory in memories.items()
        if _fits(needed(memory, usual_clip(spec), plan.offload, tiled=True), plan.room)
    ]
