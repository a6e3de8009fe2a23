"""Which plan a model runs under on a machine, and whether a request fits it.

memory = MemoryModel.of(spec, folder, machine)
plan = choose_plan(spec, memory, machine)
plan.tiled(clip)        # for each request: whether it decodes in tiles; UserError when it cannot fit
"""

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
"""Of what is free; the rest is left to others."""
GPU_RESERVE = 2**28
"""Workspaces of cuBLAS and cuDNN, and modules that CUDA loads when they are first used."""
FRAGMENTS = 0.1
"""Of a stage's tensors: what PyTorch's allocator on a GPU cannot use between them. Weights lie close."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Where weights are between uses, and what there is room for."""

    offload: Offload
    tiling: bool
    """Whether the usual clip decodes in tiles."""
    need: int
    """Bytes predicted for it."""
    room: int | None
    """Bytes that may be used; None when nobody knows."""
    memory: MemoryModel
    spec: ModelSpec
    reason: str
    frames: int | None = None
    """The longest clip of the usual size that fits, where the usual one does not."""

    def __str__(self) -> str:
        return f"{self.offload}, VAE {'in tiles' if self.tiling else 'whole'} ({self.reason})"

    def tiled(self, clip: Clip, *, lora_bytes: int = 0) -> bool:
        """Whether to decode in tiles: only when the clip does not fit whole.

        Raises UserError when it does not fit at all, with what would.
        """
        if self.room is None:
            return self.tiling
        for tiled in (False, True):
            if _fits(needed(self.memory, clip, self.offload, tiled=tiled, lora_bytes=lora_bytes), self.room):
                return tiled
        raise UserError(_refusal(self, clip, lora_bytes))


def needed(memory: MemoryModel, clip: Clip, offload: Offload, *, tiled: bool, lora_bytes: int = 0) -> int:
    """Bytes to have free: the highest of the stages, and what is no tensor."""
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
    spec: ModelSpec, memory: MemoryModel, machine: Machine, *, forced: str | None = None
) -> MemoryPlan:
    """The fastest plan that the usual clip fits: whole where any plan decodes it whole, else in tiles.

    Where it fits none but a shorter clip does, the plan for that one; longer ones are refused when they are
    asked for. forced is COGVIDEOX_OFFLOAD: that plan is taken, also when it is tight. Raises UserError when
    it names none, and when no clip fits.
    """
    if forced and forced not in OFFLOADS:
        raise UserError(f"COGVIDEOX_OFFLOAD={forced} is unknown; allowed are {', '.join(OFFLOADS)}.")
    cpu = machine.device == "cpu"
    if cpu and forced not in (None, "", "resident"):
        raise UserError(f"COGVIDEOX_OFFLOAD={forced} needs a GPU; on this CPU only resident is possible.")
    room = int(USABLE * machine.free_bytes) if machine.free_bytes else None
    offloads = [forced] if forced else OFFLOADS[:1] if cpu else _waiting_possible(memory, machine)
    free = "" if room is None else f", {machine.free_bytes / GIB:.1f} GiB free"
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
    """Clips of the same size and fewer frames, the longest first."""
    lengths = range(spec.frame_step + 1, clip.frames, spec.frame_step)
    return [replace(clip, frames=frames) for frames in reversed(lengths)]


def _fits(need: int, room: int | None) -> bool:
    return room is None or need <= room


def _waiting_possible(memory: MemoryModel, machine: Machine) -> list[Offload]:
    """Plans whose waiting weights fit into system memory, or all when nobody knows how much there is.

    Quantised weights cannot be moved layer by layer.
    """
    system = machine.system_bytes
    return [
        name
        for name in OFFLOADS
        if (system is None or memory.waiting_bytes(name) <= USABLE * system)
        and not (name == "sequential" and memory.weights != "none")
    ]


def _refusal(plan: MemoryPlan, clip: Clip, lora_bytes: int) -> str:
    """What is needed, what there is, and what would fit."""
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
    """Released models of the same task whose usual clip fits under the same plan."""
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
