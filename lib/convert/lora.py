"""LoRAs between SAT's layout and diffusers', with what scales them made explicit.

SAT multiplies a LoRA by alpha / rank and stores neither. In a file for diffusers that factor is multiplied
into B once and for all: at strength 1 it does what it does in SAT, with every loader. Where it came from
stays in the metadata, under names that no loader reads as a scale.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lib.convert import configs, detect
from lib.convert.keymap import LORA, plan_to_diffusers, plan_to_sat, sat_name
from lib.convert.planning import planned
from lib.convert.reading import MODEL, Checkpoint
from lib.convert.writing import Planned
from lib.errors import UserError
from lib.lora.keys import RECORD, without_prefix
from lib.lora.scaling import BAKED, resolve_scaling

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "transformer."
ORIGINAL = ".original."
"""Where SAT keeps the weights that a LoRA stands beside."""
DEFAULT_ALPHA = 1.0
"""SAT's own."""
MODULES = ("to_q", "to_k", "to_v", "to_out.0")
SOURCE_RANK, SOURCE_ALPHA, SOURCE_DTYPE = "source_rank", "source_alpha", "source_dtype"


@dataclass(kw_only=True)
class LoraJob:
    """A LoRA of which every matrix has its place."""

    source: str
    label: str
    family: str | None = None
    """Of the model in the same file, when there is one."""
    rank: int
    alpha: float
    """SAT's."""
    planned: list[Planned]
    metadata: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.shape for tensor in self.planned}


def check_alpha(alpha: float | None) -> None:
    """Raise UserError for what is no scale."""
    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"alpha={alpha} is not possible; it is a number above 0, 1 unless it was changed.")


def split_base(tensors: "Mapping[str, Tensor]") -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """A SAT checkpoint -> the model's own weights, by the names they had without a LoRA; the matrices."""
    base, matrices = {}, {}
    for name, tensor in tensors.items():
        if ".matrix_A." in name or ".matrix_B." in name:
            matrices[name] = tensor
        else:
            base[name.replace(ORIGINAL, ".")] = tensor
    return base, matrices


def job_to_diffusers(checkpoint: Checkpoint, *, alpha: float | None, dtype: str | None) -> LoraJob:
    """Plan a SAT LoRA as a LoRA for diffusers, in float32 unless `dtype` is given.

    `alpha` is what it was trained with, SAT's default of 1 without. Float32 because a factor that is no power
    of two costs 16-bit values their last digit. Raises UserError for matrices that are missing, over, or of
    shapes that do not fit.
    """
    name = checkpoint.name
    base, matrices = split_base(checkpoint.tensors)
    plan = plan_to_diffusers(list(matrices), LORA)
    if plan.unknown:
        raise UserError(
            f"{name} has LoRA matrices that are not understood: {', '.join(plan.unknown[:3])}. Converted are "
            "those of attention, as CogVideo's own training makes them."
        )
    rank, layers = _check(plan.outputs, matrices, name)
    used = DEFAULT_ALPHA if alpha is None else float(alpha)
    stored = str(next(iter(matrices.values())).dtype).removeprefix("torch.")
    found, family, facts = _base(base, checkpoint)
    label = f"a LoRA of rank {rank} on {layers} layers" + (f" of {found}" if found else "")
    return LoraJob(
        source=name,
        label=label,
        family=family,
        rank=rank,
        alpha=used,
        planned=[
            _scaled(tensor, PREFIX, used / rank if ".lora_B." in tensor.name else 1.0)
            for tensor in planned(plan, matrices, dtype or "float32", name=name)
        ],
        metadata={
            BAKED: "yes",
            SOURCE_RANK: str(rank),
            SOURCE_ALPHA: f"{used:.17g}",
            SOURCE_DTYPE: stored,
            **({RECORD: json.dumps(facts)} if facts else {}),
        },
        dropped=checkpoint.dropped | _dropped(base),
    )


def job_to_sat(checkpoint: Checkpoint, *, alpha: float | None, dtype: str | None) -> LoraJob:
    """Plan a LoRA of diffusers as a SAT LoRA that does the same at `alpha`.

    Without `alpha` it is what the file records of the SAT LoRA it came from, else SAT's default of 1; without
    `dtype` what that LoRA was stored in, else each matrix's own. Raises UserError for a LoRA that SAT cannot
    hold: of other layers than attention's four, or of several ranks.
    """
    name, metadata = checkpoint.name, checkpoint.metadata
    tensors = {_diffusers_key(key): tensor for key, tensor in checkpoint.tensors.items()}
    plan = plan_to_sat(list(tensors), LORA)
    if plan.unknown:
        raise UserError(
            f"{name} cannot become a SAT LoRA: it has {', '.join(plan.unknown[:3])}, and SAT's has only the "
            f"matrices of attention ({', '.join(MODULES)})."
        )
    matrices = {target: tensors[pieces[0].source] for target, pieces in plan.outputs.items()}
    rank, layers = _check(tensors, matrices, name)
    modules = {key.partition(".lora_")[0]: rank for key in tensors}
    scaling = resolve_scaling(metadata, ranks=modules, alpha_tensors={}, name=name)
    used = (_recorded_alpha(metadata) or DEFAULT_ALPHA) if alpha is None else float(alpha)

    def factor(target: str) -> float:
        module = plan.outputs[target][0].source.partition(".lora_")[0]
        return scaling.alphas[module] * (math.sqrt(rank) if scaling.rslora else 1.0) / used

    stored = metadata.get(SOURCE_DTYPE) if BAKED in metadata else None
    dtype = dtype or (stored if stored in ("float16", "bfloat16", "float32") else None)
    return LoraJob(
        source=name,
        label=f"a LoRA of rank {rank} on {layers} layers",
        rank=rank,
        alpha=used,
        planned=[
            _scaled(tensor, MODEL, factor(tensor.name) if ".matrix_B." in tensor.name else 1.0)
            for tensor in planned(plan, tensors, dtype, name=name)
        ],
    )


def _scaled(tensor: Planned, prefix: str, scale: float) -> Planned:
    return replace(tensor, name=prefix + tensor.name, scale=scale)


def _check(outputs: Mapping[str, object], matrices: "Mapping[str, Tensor]", name: str) -> tuple[int, int]:
    """Rank and number of layers. `outputs` are diffusers' names, `matrices` are by SAT's."""
    layers = 1 + max(int(key.split(".")[1]) for key in outputs) if outputs else 0
    wanted = {
        (module, layer): [f"transformer_blocks.{layer}.attn1.{module}.lora_{side}.weight" for side in "AB"]
        for layer in range(layers)
        for module in MODULES
    }
    rank = width = None
    for pair in wanted.values():
        if lacking := next((key for key in pair if key not in outputs), None):
            raise UserError(f"{name} is not a whole SAT LoRA: it lacks {sat_name(lacking, LORA)}.")
        down, up = (matrices[sat_name(key, LORA)] for key in pair)
        if rank is None and down.dim() == 2:
            rank, width = down.shape
        if tuple(down.shape) != (rank, width) or tuple(up.shape) != (width, rank):
            raise UserError(
                f"{name}: {sat_name(pair[0], LORA)} and its other half are {list(down.shape)} and "
                f"{list(up.shape)}; in a SAT LoRA of rank {rank} and width {width} they are "
                f"{[rank, width]} and {[width, rank]}."
            )
    if rank is None:
        raise UserError(f"{name} holds no LoRA matrices.")
    return rank, layers


def _base(base: "Mapping[str, Tensor]", checkpoint: Checkpoint) -> tuple[str, str | None, dict[str, str]]:
    """What the LoRA was trained on, when its file holds that too: in words, its family, what to record."""
    if "mixins.patch_embed.proj.weight" not in base:
        return "", None, {}
    shapes = {key: tuple(tensor.shape) for key, tensor in base.items()}
    sizes = detect.transformer_sizes(shapes, name=checkpoint.name)
    family = detect.family_of(sizes)
    label = detect.variant(sizes, family)
    facts = {"task": configs.FAMILIES[family].task}
    return label, family, ({"base": label} if label == family else {}) | facts


def _dropped(base: "Mapping[str, Tensor]") -> dict[str, str]:
    if not base:
        return {}
    return {"the model's own weights": f"{len(base)} tensors: of the model that the LoRA was trained on"}


def _recorded_alpha(metadata: Mapping[str, str]) -> float | None:
    try:
        found = float(metadata[SOURCE_ALPHA])
    except (KeyError, ValueError):
        return None
    return found if 0 < found < math.inf else None


def _diffusers_key(key: str) -> str:
    _, key = without_prefix(key)
    for side, written in (("A", "lora.down"), ("B", "lora.up")):
        key = key.replace(f".{written}.weight", f".lora_{side}.weight")
    return key
