"""Convert LoRAs between SAT's layout and diffusers', each into a new folder with a report in it.

    convert_lora(file, target=folder, direction="to_diffusers")     SAT LoRA -> lora.safetensors
    convert_lora(file, target=folder, direction="to_sat")           and back

SAT multiplies a LoRA by alpha / rank and stores neither. For diffusers that factor is multiplied into B, so
that strength 1 has the effect it has in SAT with every loader. The original values are kept in the metadata,
under names that no loader takes for a scale.
"""

import itertools
import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lib.convert import configs, detect
from lib.convert.formats import STEP, check_lora, check_torch, write_safetensors, write_states
from lib.convert.keymap import LORA, plan_to_diffusers, plan_to_sat, sat_name
from lib.convert.locate import STATES
from lib.convert.planning import Conversion, plan_tensors, shapes_of
from lib.convert.reading import MODEL, Checkpoint, open_checkpoint
from lib.convert.report import ConversionReport, announce, lora_usage, sat_usage, write_report
from lib.convert.writing import Progress, dtype_name, new_folder, require_room
from lib.errors import UserError
from lib.lora.file import RECORD, number
from lib.lora.names import sort_keys
from lib.lora.scaling import BAKED, resolve_scaling
from lib.progress import Report

LORA_FILE = "lora.safetensors"
PREFIX = "transformer."
ORIGINAL = ".original."
"""Where SAT keeps the base weights of a layer with a LoRA."""
DEFAULT_ALPHA = 1.0
"""SAT's own."""
MODULES = ("to_q", "to_k", "to_v", "to_out.0")
MAX_LAYERS = 200
FLAT_MODULES = [f"transformer_blocks.{n}.attn1.{module}" for n in range(MAX_LAYERS) for module in MODULES]
"""What names with _ for dots may stand for."""
SOURCE_RANK, SOURCE_ALPHA, SOURCE_DTYPE = "source_rank", "source_alpha", "source_dtype"


def convert_lora(
    source: Path,
    *,
    target: Path,
    direction: str,
    alpha: float | None = None,
    dtype: str | None = None,
    report: Report = print,
    stop: threading.Event | None = None,
) -> ConversionReport:
    """Convert a LoRA into the new folder `target`.

    `direction` to_diffusers makes lora.safetensors of a SAT checkpoint, with alpha / rank multiplied in:
    `alpha` is what it was trained with; SAT does not store it, and its default is 1 (CogVideo's own
    fine-tuning recipes say 64 at rank 128). to_sat makes `latest` and 1/mp_rank_00_model_states.pt of a
    diffusers LoRA, with the same effect at `alpha`: by default that of the SAT LoRA it was converted from,
    else 1. Raises UserError as to_diffusers does.
    """
    to_sat = direction == "to_sat"
    with new_folder(target) as folder:
        with open_checkpoint(source, stop=stop) as opened:
            layout = "diffusers" if to_sat else "sat"
            detect.require(detect.identify(opened.tensors), "lora", layout, name=opened.name)
            plan = plan_lora_to_sat if to_sat else plan_lora_to_diffusers
            conversion = plan(opened, alpha=alpha, dtype=dtype)
            planned, part = conversion.planned, conversion.part()
            require_room(folder, planned)
            progress = Progress("LoRA", planned, report, stop)
            if to_sat:
                part.files = write_states(folder, planned, progress)
                part.checked = check_torch(folder / STEP / STATES, "module", planned)
            else:
                part.files = write_safetensors(
                    folder, "lora", planned, progress, shard_bytes=None, metadata=conversion.metadata
                )
                part.checked = check_lora(folder / LORA_FILE, planned)
        result = ConversionReport(
            direction="to SAT" if to_sat else "to diffusers",
            variant=conversion.variant,
            family=conversion.family,
            parts=[part],
            settings=conversion.config,
        )
        if alpha is None and not to_sat:
            result.notes.append(
                f"alpha was not given: SAT stores none, and its default of {DEFAULT_ALPHA:g} was used. "
                "CogVideo's own fine-tunes use 64 at rank 128."
            )
        write_report(result, folder, sat_usage(result) if to_sat else lora_usage(result))
    announce(result, target, report)
    return result


def split_base(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a SAT checkpoint's base weights, by their names without a LoRA, and the LoRA's matrices."""
    base, matrices = {}, {}
    for name, tensor in tensors.items():
        if ".matrix_A." in name or ".matrix_B." in name:
            matrices[name] = tensor
        else:
            base[name.replace(ORIGINAL, ".")] = tensor
    return base, matrices


def plan_lora_to_diffusers(checkpoint: Checkpoint, *, alpha: float | None, dtype: str | None) -> Conversion:
    """Plan a SAT LoRA as a diffusers LoRA, in float32 unless `dtype` is given.

    `alpha` is what it was trained with, by default SAT's 1. Float32, because a factor that is not a power of
    two costs 16-bit values their last digit. Raises UserError for matrices that are missing, unexpected, or
    of shapes that do not fit.
    """
    name, dropped = checkpoint.name, dict(checkpoint.dropped)
    base, matrices = split_base(checkpoint.tensors)
    if base:
        dropped["the base's weights"] = f"{len(base)} tensors: of the model that the LoRA was trained on"
    plan = plan_to_diffusers(list(matrices), LORA)
    if plan.unknown:
        raise UserError(
            f"{name} has unsupported LoRA matrices: {', '.join(plan.unknown[:3])}. Only attention's, which "
            "CogVideo's own training creates, can be converted."
        )
    rank, layers = _check_matrices(plan.outputs, matrices, name)
    used = DEFAULT_ALPHA if alpha is None else float(alpha)
    stored = dtype_name(next(iter(matrices.values())).dtype)
    found, family, facts = _base_facts(base, checkpoint)
    return Conversion(
        component="lora",
        source=name,
        variant=f"a LoRA of rank {rank} on {layers} layers" + (f" of {found}" if found else ""),
        family=family,
        config={"rank": rank, "alpha": used},
        planned=plan_tensors(
            plan,
            matrices,
            dtype or "float32",
            name=name,
            prefix=PREFIX,
            scale=lambda key: used / rank if ".lora_B." in key else 1.0,
        ),
        metadata={
            BAKED: "yes",
            SOURCE_RANK: str(rank),
            SOURCE_ALPHA: f"{used:.17g}",
            SOURCE_DTYPE: stored,
            **({RECORD: json.dumps(facts)} if facts else {}),
        },
        dropped=dropped,
    )


def plan_lora_to_sat(checkpoint: Checkpoint, *, alpha: float | None, dtype: str | None) -> Conversion:
    """Plan a diffusers LoRA as a SAT LoRA that has the same effect with `alpha`.

    Without `alpha` it is what the file records of the SAT LoRA it came from, else SAT's default of 1; without
    `dtype` what that LoRA was stored in, else each matrix's own. Raises UserError for a LoRA that SAT does
    not support: of layers other than attention's four, or of several ranks.
    """
    name, metadata = checkpoint.name, checkpoint.metadata
    keys = sort_keys(checkpoint.tensors, FLAT_MODULES, name=name)
    tensors = {
        f"{module}.lora_{'A' if side == 'down' else 'B'}.weight": checkpoint.tensors[key]
        for (module, side), key in keys.matrices.items()
    }
    plan = plan_to_sat(list(tensors), LORA)
    if plan.unknown:
        raise UserError(
            f"{name} cannot be converted to a SAT LoRA: it has {', '.join(plan.unknown[:3])}, and SAT "
            f"supports only attention's matrices ({', '.join(MODULES)})."
        )
    matrices = {target: tensors[pieces[0].source] for target, pieces in plan.outputs.items()}
    rank, layers = _check_matrices(tensors, matrices, name)
    modules = {key.partition(".lora_")[0]: rank for key in tensors}
    scaling = resolve_scaling(
        metadata,
        checkpoint.adapter_config,
        ranks=modules,
        alpha_tensors={module: number(checkpoint.tensors[key]) for module, key in keys.alphas.items()},
        name=name,
    )
    used = (_recorded_alpha(metadata) or DEFAULT_ALPHA) if alpha is None else float(alpha)

    def scale(key: str) -> float:
        if ".matrix_B." not in key:
            return 1.0
        module = plan.outputs[key][0].source.partition(".lora_")[0]
        return scaling.alphas[module] * (math.sqrt(rank) if scaling.rslora else 1.0) / used

    stored = metadata.get(SOURCE_DTYPE) if BAKED in metadata else None
    dtype = dtype or (stored if stored in ("float16", "bfloat16", "float32") else None)
    return Conversion(
        component="lora",
        source=name,
        variant=f"a LoRA of rank {rank} on {layers} layers",
        config={"rank": rank, "alpha": used},
        planned=plan_tensors(plan, tensors, dtype, name=name, prefix=MODEL, scale=scale),
    )


def _check_matrices(
    outputs: Mapping[str, object], matrices: Mapping[str, Tensor], name: str
) -> tuple[int, int]:
    """Return rank and number of layers. `outputs` has diffusers' names, `matrices` SAT's."""
    layers = 1 + max(int(key.split(".")[1]) for key in outputs) if outputs else 0
    rank = width = None
    for layer, module in itertools.product(range(layers), MODULES):
        keys = [f"transformer_blocks.{layer}.attn1.{module}.lora_{side}.weight" for side in "AB"]
        sat_keys = [sat_name(key, LORA) or key for key in keys]
        for key, sat_key in zip(keys, sat_keys, strict=True):
            if key not in outputs:
                raise UserError(f"{name} is not a complete SAT LoRA: {sat_key} is missing.")
        down, up = (matrices[sat_key] for sat_key in sat_keys)
        if rank is None and down.dim() == 2:
            rank, width = down.shape
        if tuple(down.shape) != (rank, width) or tuple(up.shape) != (width, rank):
            raise UserError(
                f"{name}: {sat_keys[0]} and its other half are {list(down.shape)} and "
                f"{list(up.shape)}; in a SAT LoRA of rank {rank} and width {width} they are "
                f"{[rank, width]} and {[width, rank]}."
            )
    if rank is None:
        raise UserError(f"{name} holds no LoRA matrices.")
    return rank, layers


def _base_facts(base: Mapping[str, Tensor], checkpoint: Checkpoint) -> tuple[str, str | None, dict[str, str]]:
    """Return the variant and family of the model in the LoRA's file, if any, and what to record of it."""
    if "mixins.patch_embed.proj.weight" not in base:
        return "", None, {}
    sizes = detect.transformer_sizes(shapes_of(base), name=checkpoint.name)
    family = detect.family_of(sizes)
    variant = detect.variant(sizes, family)
    facts = {"task": configs.FAMILIES[family].task}
    return variant, family, ({"base": variant} if variant == family else {}) | facts


def _recorded_alpha(metadata: Mapping[str, str]) -> float | None:
    try:
        found = float(metadata[SOURCE_ALPHA])
    except (KeyError, ValueError):
        return None
    return found if 0 < found < math.inf else None
