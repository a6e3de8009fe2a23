"""Plan a conversion before writing: an open checkpoint -> the tensors to write and their configuration."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from lib.convert import configs, detect
from lib.convert.configs import Options
from lib.convert.keymap import (
    SINCOS_TRANSFORMER,
    TRANSFORMER,
    VAE,
    Piece,
    Plan,
    Shape,
    Table,
    plan_to_diffusers,
    plan_to_sat,
    sat_name,
    shape_of,
)
from lib.convert.reading import MODEL, Checkpoint
from lib.convert.report import Part
from lib.convert.writing import PlannedTensor, dtype_name
from lib.errors import UserError
from lib.storage.disk import size_text

Component = Literal["transformer", "vae"]
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VAE_DTYPE = "float32"
CLASSES = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
LISTED = 3


@dataclass(kw_only=True)
class Conversion:
    """One planned model, with the destination of every tensor."""

    component: Component | Literal["lora"]
    source: str
    """Name of its file in messages."""
    variant: str
    family: str | None = None
    planned: list[PlannedTensor]
    config: dict[str, Any] = field(default_factory=dict)
    """config.json; of a LoRA its rank, and alpha as SAT counts it."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of a LoRA's safetensors file."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Name in the source -> why it is not converted."""

    def part(self) -> Part:
        """Return the report's part on this model, without files yet."""
        dtypes = sorted({dtype_name(tensor.dtype) for tensor in self.planned})
        return Part(
            name=self.component,
            source=self.source,
            variant=self.variant,
            tensors=len(self.planned),
            dtype=", ".join(dtypes),
            dropped=self.dropped,
        )


def plan_transformer(
    tensors: Mapping[str, Tensor], *, name: str, family: str | None, dtype: str | None, options: Options
) -> Conversion:
    """Plan a transformer from SAT to diffusers; `dtype` None means the one its family is released in.

    Raises UserError, with SAT's names, for tensors that are missing, unexpected or of another shape.
    """
    shapes = shapes_of(tensors)
    sizes = detect.transformer_sizes(shapes, name=name)
    found = detect.family_of(sizes, given=family)
    config = configs.transformer_config(sizes, configs.FAMILIES[found], options)
    table = TRANSFORMER if sizes.learned_positions else SINCOS_TRANSFORMER
    plan = plan_to_diffusers(list(tensors), table)
    variant = detect.variant(sizes, found)
    _check(plan, shapes, model_shapes("transformer", config), table, name=name, what=variant)
    return Conversion(
        component="transformer",
        source=name,
        variant=variant,
        family=found,
        planned=plan_tensors(plan, tensors, dtype or configs.FAMILIES[found].dtype, name=name),
        config=config,
        dropped=plan.dropped,
    )


def plan_vae(
    tensors: Mapping[str, Tensor], *, name: str, family: str, dtype: str | None, options: Options
) -> Conversion:
    """Plan a VAE from SAT to diffusers, with the scaling of its family."""
    shapes = shapes_of(tensors)
    config = configs.vae_config(detect.vae_sizes(shapes, name=name), configs.FAMILIES[family], options)
    levels = detect.vae_levels(tensors)
    plan = plan_to_diffusers(list(tensors), VAE, levels=levels)
    _check(plan, shapes, model_shapes("vae", config), VAE, name=name, what="a CogVideoX VAE", levels=levels)
    return Conversion(
        component="vae",
        source=name,
        variant="a CogVideoX VAE",
        family=family,
        planned=plan_tensors(plan, tensors, dtype or VAE_DTYPE, name=name),
        config=config,
        dropped=plan.dropped,
    )


def plan_sat(
    component: Component, checkpoint: Checkpoint, *, dtype: str | None, options: Options
) -> Conversion:
    """Plan a component from diffusers to SAT, in the dtypes it is stored in unless `dtype` is given.

    Without the checkpoint's config.json the family's sizes are used. Raises UserError as the others do.
    """
    name, tensors, config = checkpoint.name, checkpoint.tensors, checkpoint.config or {}
    table, what = (TRANSFORMER, "transformer") if component == "transformer" else (VAE, "VAE")
    shapes = shapes_of(tensors)
    levels = detect.vae_levels(tensors) if component == "vae" else 0
    plan = plan_to_sat(list(tensors), table, levels=levels)
    _refuse_unknown(plan, name=name, what=f"CogVideoX {what}")
    if plan.missing:
        raise UserError(f"{name} is not a complete CogVideoX {what}: {_some(plan.missing)} is missing.")
    sat_shapes = {target: _shape(pieces, shapes, name) for target, pieces in plan.outputs.items()}
    if component == "transformer":
        family, variant, expected = _transformer_of(sat_shapes, config, options, name=name)
    else:
        family, variant = None, "a CogVideoX VAE"
        groups = {key: config[key] for key in ("norm_num_groups",) if key in config}
        sizes = detect.vae_sizes(sat_shapes, name=name)
        expected = configs.vae_config(sizes, configs.FAMILIES["cogvideox-5b"], groups | dict(options))
    identity = Plan(outputs={key: [Piece(key)] for key in tensors})
    _check(identity, shapes, model_shapes(component, expected), {}, name=name, what=variant)
    return Conversion(
        component=component,
        source=name,
        variant=variant,
        family=family,
        planned=plan_tensors(
            plan, tensors, dtype, name=name, prefix=MODEL if component == "transformer" else ""
        ),
        config=expected,
    )


def _transformer_of(
    sat_shapes: Mapping[str, Shape], config: Mapping[str, Any], options: Options, *, name: str
) -> tuple[str, str, dict[str, Any]]:
    """Return family, variant and expected config of a diffusers transformer by its shapes in SAT's names."""
    sizes = detect.transformer_sizes(sat_shapes, name=name)
    given = None
    if sizes.rotary is None:
        families = {True: "cogvideox-5b", False: "cogvideox-2b"}
        given = families.get(config.get("use_rotary_positional_embeddings", ""))
    family = detect.family_of(sizes, given=given)
    configured = {key: config[key] for key in configs.TRANSFORMER_OPTIONS if config.get(key)}
    expected = configs.transformer_config(sizes, configs.FAMILIES[family], configured | dict(options))
    return family, detect.variant(sizes, family), expected


def model_shapes(component: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the tensors that diffusers expects of a model of this configuration, without allocating any."""
    with torch.device("meta"):
        model = getattr(diffusers, CLASSES[component]).from_config(dict(config))
    return shapes_of(model.state_dict())


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the tensors' shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def plan_tensors(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    dtype: str | None,
    *,
    name: str,
    prefix: str = "",
    scale: Callable[[str], float] = lambda key: 1.0,
) -> list[PlannedTensor]:
    """Return views of the source for every output; `dtype` None keeps each tensor's own.

    `scale` gives the factor of an output's values, `prefix` is put before its name.
    """
    planned = []
    for key, pieces in plan.outputs.items():
        views = [_view(tensors[piece.source], piece) for piece in pieces]
        target = getattr(torch, dtype) if dtype else views[0].dtype
        for found in (*(view.dtype for view in views if not view.dtype.is_floating_point), target):
            if found not in WEIGHT_DTYPES:
                raise UserError(
                    f"{name} cannot be converted: {pieces[0].source} is stored as {dtype_name(found)}; "
                    f"weights are {', '.join(map(dtype_name, WEIGHT_DTYPES))}."
                )
        _refuse_expanded(pieces, tensors, name)
        shape = shape_of(pieces, {piece.source: tuple(tensors[piece.source].shape) for piece in pieces})
        planned.append(
            PlannedTensor(
                name=prefix + key,
                pieces=views,
                shape=shape,
                dtype=target,
                scale=scale(key),
                source=name,
            )
        )
    return planned


def _check(
    plan: Plan,
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    table: Table,
    *,
    name: str,
    what: str,
    levels: int = 0,
) -> None:
    """Raise UserError, with SAT's names, unless a plan produces exactly the expected tensors."""

    def in_source(outputs: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(sat_name(each, table, levels=levels) or each for each in outputs))

    _refuse_unknown(plan, name=name, what=what.removeprefix("a "))
    if missing := in_source(key for key in expected if key not in plan.outputs):
        raise UserError(f"{name} is not a complete model ({what}): {_some(missing)} is missing.")
    if unexpected := in_source(key for key in plan.outputs if key not in expected):
        raise UserError(f"{name} ({what}) has tensors that such a model does not have: {_some(unexpected)}.")
    for key, pieces in plan.outputs.items():
        found = _shape(pieces, shapes, name)
        if found != expected[key]:
            raise UserError(
                f"{name} ({what}): {in_source([key])[0]} has the shape {list(shapes[pieces[0].source])}, "
                f"which does not fit its other tensors: {key} would be {list(expected[key])}, "
                f"not {list(found)}."
            )


def _refuse_expanded(pieces: list[Piece], tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse an expanded tensor: a few stored bytes could claim any size, which would be written in full."""
    for source in {piece.source for piece in pieces}:
        claimed, stored = tensors[source].nbytes, tensors[source].untyped_storage().nbytes()
        if claimed > stored:
            raise UserError(
                f"{name} is refused: its {source} claims {size_text(claimed)} and has {size_text(stored)}."
            )


def _view(tensor: Tensor, piece: Piece) -> Tensor:
    if piece.of == 1:
        return tensor
    rows = tensor.shape[0] // piece.of
    return tensor.narrow(0, piece.chunk * rows, rows)


def _shape(pieces: list[Piece], shapes: Mapping[str, Shape], name: str) -> Shape:
    try:
        return shape_of(pieces, shapes)
    except ValueError as error:
        raise UserError(f"{name}: {error}, whose rows cannot be split or joined as needed.") from None


def _refuse_unknown(plan: Plan, *, name: str, what: str) -> None:
    if plan.unknown:
        count = len(plan.unknown)
        raise UserError(
            f"{name} has {count} tensor{'s' * (count > 1)} that no {what} has: {_some(plan.unknown)}. It is "
            "another model, or was trained with additions that diffusers does not support."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:120] for name in names[:LISTED])
    return shown + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
