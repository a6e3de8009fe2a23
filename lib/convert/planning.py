"""An open checkpoint -> the tensors to write and the configuration they fit, before anything is written."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

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
from lib.convert.writing import NAMES, Planned
from lib.errors import UserError
from lib.storage.disk import size_text

if TYPE_CHECKING:
    from torch import Tensor

Component = Literal["transformer", "vae"]
DTYPES = ("float16", "bfloat16", "float32")
VAE_DTYPE = "float32"
CLASSES: dict[str, str] = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
NAMED = 3


@dataclass(kw_only=True)
class Job:
    """One model of which every tensor has its place."""

    component: Component
    source: str
    variant: str
    family: str | None
    planned: list[Planned]
    config: dict[str, Any]
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return ", ".join(sorted({_label(tensor.dtype) for tensor in self.planned}))


def transformer_job(
    tensors: "Mapping[str, Tensor]", *, name: str, family: str | None, dtype: str | None, options: Options
) -> Job:
    """A transformer in SAT's names -> diffusers'; `dtype` None is the one that its family is released in.

    Raises UserError, in SAT's names, for what is missing, over or of another shape.
    """
    shapes = _shapes(tensors)
    sizes = detect.transformer_sizes(shapes, name=name)
    found = detect.family_of(sizes, given=family)
    config = configs.transformer_config(sizes, configs.FAMILIES[found], options)
    table = TRANSFORMER if sizes.learned_positions else SINCOS_TRANSFORMER
    plan = plan_to_diffusers(list(tensors), table)
    label = detect.variant(sizes, found)
    check(plan, shapes, model_shapes("transformer", config), table, name=name, what=label)
    return Job(
        component="transformer",
        source=name,
        variant=label,
        family=found,
        planned=planned(plan, tensors, dtype or configs.FAMILIES[found].dtype, name=name),
        config=config,
        dropped=plan.dropped,
    )


def vae_job(
    tensors: "Mapping[str, Tensor]", *, name: str, family: str, dtype: str | None, options: Options
) -> Job:
    """A VAE in SAT's names -> diffusers', with the scaling of its family."""
    shapes = _shapes(tensors)
    config = configs.vae_config(detect.vae_sizes(shapes, name=name), configs.FAMILIES[family], options)
    levels = detect.vae_levels(tensors)
    plan = plan_to_diffusers(list(tensors), VAE, levels=levels)
    check(plan, shapes, model_shapes("vae", config), VAE, name=name, what="a CogVideoX VAE", levels=levels)
    return Job(
        component="vae",
        source=name,
        variant="a CogVideoX VAE",
        family=family,
        planned=planned(plan, tensors, dtype or VAE_DTYPE, name=name),
        config=config,
        dropped=plan.dropped,
    )


def sat_job(
    component: Component,
    tensors: "Mapping[str, Tensor]",
    *,
    name: str,
    config: Mapping[str, Any] | None,
    dtype: str | None,
    options: Options,
) -> Job:
    """A diffusers component -> SAT's names, in the types it is stored in unless `dtype` is given.

    `config` is its config.json; without it the family's sizes are taken. Raises UserError as the others do.
    """
    table, what = (TRANSFORMER, "transformer") if component == "transformer" else (VAE, "VAE")
    levels = detect.vae_levels(tensors) if component == "vae" else 0
    shapes = _shapes(tensors)
    plan = plan_to_sat(list(tensors), table, levels=levels)
    _refuse_unknown(plan, name=name, what=f"CogVideoX {what}")
    if plan.missing:
        raise UserError(f"{name} is not a whole CogVideoX {what}: it lacks {_some(plan.missing)}.")
    there = {target: _shape(pieces, shapes, name) for target, pieces in plan.outputs.items()}
    family, label = None, "a CogVideoX VAE"
    if component == "transformer":
        sizes = detect.transformer_sizes(there, name=name)
        rotary = (config or {}).get("use_rotary_positional_embeddings")
        given = {True: "cogvideox-5b", False: "cogvideox-2b"}.get(rotary)
        family = detect.family_of(sizes, given=given if sizes.rotary is None else None)
        label = detect.variant(sizes, family)
        made = configs.transformer_config(sizes, configs.FAMILIES[family], _sizes_in(config) | dict(options))
    else:
        groups = {"norm_num_groups": config["norm_num_groups"]} if "norm_num_groups" in (config or {}) else {}
        sizes = detect.vae_sizes(there, name=name)
        made = configs.vae_config(sizes, configs.FAMILIES["cogvideox-5b"], groups | dict(options))
    identity = Plan(outputs={key: [Piece(key)] for key in tensors})
    check(identity, shapes, model_shapes(component, made), {}, name=name, what=label)
    return Job(
        component=component,
        source=name,
        variant=label,
        family=family,
        planned=planned(plan, tensors, dtype, name=name),
        config=made,
    )


def _sizes_in(config: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: config[key] for key in configs.TRANSFORMER_OPTIONS if config and config.get(key)}


def model_shapes(component: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that diffusers expects of a model of this configuration, without making any."""
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, CLASSES[component]).from_config(dict(config))
    return _shapes(model.state_dict())


def check(
    plan: Plan,
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    table: Table,
    *,
    name: str,
    what: str,
    levels: int = 0,
) -> None:
    """Raise UserError unless a plan makes exactly the expected tensors; it speaks of them by SAT's names."""

    def written(ours: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(sat_name(each, table, levels=levels) or each for each in ours))

    _refuse_unknown(plan, name=name, what=what.removeprefix("a "))
    if missing := written(key for key in expected if key not in plan.outputs):
        raise UserError(f"{name} is not a whole model ({what}): it lacks {_some(missing)}.")
    if over := written(key for key in plan.outputs if key not in expected):
        raise UserError(f"{name} ({what}) has tensors that such a model has not: {_some(over)}.")
    for key, pieces in plan.outputs.items():
        found = _shape(pieces, shapes, name)
        if found != expected[key]:
            there = written([key])[0]
            raise UserError(
                f"{name} ({what}): {there} has the shape {list(shapes[pieces[0].source])}, which does not "
                f"fit its other tensors: {key} would be {list(expected[key])}, not {list(found)}."
            )


def planned(plan: Plan, tensors: "Mapping[str, Tensor]", dtype: str | None, *, name: str) -> list[Planned]:
    """Views of the source for every output; `dtype` None keeps each tensor's own."""
    import torch

    done = []
    for key, pieces in plan.outputs.items():
        views = [_view(tensors[piece.source], piece) for piece in pieces]
        kind = getattr(torch, dtype) if dtype else views[0].dtype
        strange = [view.dtype for view in views if not view.dtype.is_floating_point]
        if strange or _label(kind) not in NAMES:
            raise UserError(
                f"{name} cannot be converted: {pieces[0].source} is stored as "
                f"{_label((strange or [kind])[0])}; weights are {', '.join(NAMES)}."
            )
        _refuse_repeated(pieces, tensors, name)
        shape = shape_of(pieces, {piece.source: tuple(tensors[piece.source].shape) for piece in pieces})
        done.append(Planned(name=key, pieces=views, shape=shape, dtype=kind, source=name))
    return done


def _refuse_repeated(pieces: list[Piece], tensors: "Mapping[str, Tensor]", name: str) -> None:
    """A few bytes can claim to be a tensor of any size, which would be made when it is written."""
    for source in {piece.source for piece in pieces}:
        claimed, stored = tensors[source].nbytes, tensors[source].untyped_storage().nbytes()
        if claimed > stored:
            raise UserError(
                f"{name} is refused: its {source} claims {size_text(claimed)} and has {size_text(stored)}."
            )


def check_dtype(dtype: str | None, *, name: str = "dtype") -> None:
    """Raise UserError for a type that no weights are written in."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"{name}={dtype} is unknown; allowed are {', '.join(DTYPES)}.")


def _view(tensor: "Tensor", piece: Piece) -> "Tensor":
    if piece.of == 1:
        return tensor
    rows = tensor.shape[0] // piece.of
    return tensor.narrow(0, piece.chunk * rows, rows)


def _shape(pieces: list[Piece], shapes: Mapping[str, Shape], name: str) -> Shape:
    try:
        return shape_of(pieces, shapes)
    except ValueError as error:
        raise UserError(f"{name}: {error}, which cannot be cut or joined as the layouts ask.") from None


def _shapes(tensors: "Mapping[str, Tensor]") -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _refuse_unknown(plan: Plan, *, name: str, what: str) -> None:
    if plan.unknown:
        count = len(plan.unknown)
        raise UserError(
            f"{name} has {count} tensor{'s' * (count > 1)} that no {what} has: {_some(plan.unknown)}. It is "
            "another model, or was trained with additions that diffusers has no place for."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:120] for name in names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _label(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
