"""SAT's tensor names <-> diffusers', and how rows are split and joined on the way.

One table per kind of file, read in both directions. `{n}` stands for a number, `{up}` for one that the other
layout counts from the last level down, `{end}` for weight or bias, `*` for anything. A name alone means a
copy; Rows splits one tensor into several; Dropped gives the reason why a tensor is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """A SAT tensor that diffusers splits by rows: which of its equal chunks make up each of `names`."""

    names: tuple[str, ...]
    chunks: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return sum(len(chunks) for chunks in self.chunks)


@dataclass(frozen=True)
class Dropped:
    """A SAT tensor that diffusers does not have."""

    reason: str


Table = Mapping[str, str | Rows | Dropped]

SINCOS = "sinusoidal positions; diffusers computes them itself"
ROTARY = "a buffer of the rotary positions; diffusers computes it itself"
UNUSED = "SAT's own table of positions, which CogVideoX does not use"

TRANSFORMER: Table = {
    "time_embed.0.{end}": "time_embedding.linear_1.{end}",
    "time_embed.2.{end}": "time_embedding.linear_2.{end}",
    "ofs_embed.0.{end}": "ofs_embedding.linear_1.{end}",
    "ofs_embed.2.{end}": "ofs_embedding.linear_2.{end}",
    "mixins.patch_embed.proj.{end}": "patch_embed.proj.{end}",
    "mixins.patch_embed.text_proj.{end}": "patch_embed.text_proj.{end}",
    "mixins.pos_embed.pos_embedding": "patch_embed.pos_embedding",  # learned; see SINCOS_TRANSFORMER
    "mixins.pos_embed.freqs_sin": Dropped(ROTARY),
    "mixins.pos_embed.freqs_cos": Dropped(ROTARY),
    "transformer.position_embeddings.weight": Dropped(UNUSED),
    "transformer.layers.{n}.input_layernorm.{end}": "transformer_blocks.{n}.norm1.norm.{end}",
    "transformer.layers.{n}.attention.query_key_value.{end}": Rows(
        names=(
            "transformer_blocks.{n}.attn1.to_q.{end}",
            "transformer_blocks.{n}.attn1.to_k.{end}",
            "transformer_blocks.{n}.attn1.to_v.{end}",
        ),
        chunks=((0,), (1,), (2,)),
    ),
    "transformer.layers.{n}.attention.dense.{end}": "transformer_blocks.{n}.attn1.to_out.0.{end}",
    "transformer.layers.{n}.post_attention_layernorm.{end}": "transformer_blocks.{n}.norm2.norm.{end}",
    "transformer.layers.{n}.mlp.dense_h_to_4h.{end}": "transformer_blocks.{n}.ff.net.0.proj.{end}",
    "transformer.layers.{n}.mlp.dense_4h_to_h.{end}": "transformer_blocks.{n}.ff.net.2.{end}",
    # Shift, scale and gate before attention, then before the MLP, of the video; then the same of the text.
    "mixins.adaln_layer.adaLN_modulations.{n}.1.{end}": Rows(
        names=("transformer_blocks.{n}.norm1.linear.{end}", "transformer_blocks.{n}.norm2.linear.{end}"),
        chunks=((0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11)),
    ),
    "mixins.adaln_layer.query_layernorm_list.{n}.{end}": "transformer_blocks.{n}.attn1.norm_q.{end}",
    "mixins.adaln_layer.key_layernorm_list.{n}.{end}": "transformer_blocks.{n}.attn1.norm_k.{end}",
    "transformer.final_layernorm.{end}": "norm_final.{end}",
    "mixins.final_layer.norm_final.{end}": "norm_out.norm.{end}",
    "mixins.final_layer.adaLN_modulation.1.{end}": "norm_out.linear.{end}",
    "mixins.final_layer.linear.{end}": "proj_out.{end}",
}
SINCOS_TRANSFORMER: Table = {**TRANSFORMER, "mixins.pos_embed.pos_embedding": Dropped(SINCOS)}
"""For models with sinusoidal positions, whose fine-tuned files may hold the computed ones."""

_RESIDUAL = {
    "norm1.{end}": "norm1.{end}",
    "norm2.{end}": "norm2.{end}",
    "conv1.conv.{end}": "conv1.conv.{end}",
    "conv2.conv.{end}": "conv2.conv.{end}",
    "nin_shortcut.{end}": "conv_shortcut.{end}",
}
_NORMS = ("norm_layer.{end}", "conv_y.conv.{end}", "conv_b.conv.{end}")
"""A decoder norm, modulated by the latents."""
_MODULATED = {f"norm{n}.{part}": f"norm{n}.{part}" for n in (1, 2) for part in _NORMS} | {
    sat: ours for sat, ours in _RESIDUAL.items() if not sat.startswith("norm")
}
_PLACES = {
    "encoder.down.{n}.block.{n}.": ("encoder.down_blocks.{n}.resnets.{n}.", _RESIDUAL),
    "encoder.mid.block_1.": ("encoder.mid_block.resnets.0.", _RESIDUAL),
    "encoder.mid.block_2.": ("encoder.mid_block.resnets.1.", _RESIDUAL),
    "decoder.mid.block_1.": ("decoder.mid_block.resnets.0.", _MODULATED),
    "decoder.mid.block_2.": ("decoder.mid_block.resnets.1.", _MODULATED),
    "decoder.up.{up}.block.{n}.": ("decoder.up_blocks.{up}.resnets.{n}.", _MODULATED),
}
VAE: Table = {
    "encoder.conv_in.conv.{end}": "encoder.conv_in.conv.{end}",
    "encoder.down.{n}.downsample.conv.{end}": "encoder.down_blocks.{n}.downsamplers.0.conv.{end}",
    "encoder.norm_out.{end}": "encoder.norm_out.{end}",
    "encoder.conv_out.conv.{end}": "encoder.conv_out.conv.{end}",
    "decoder.conv_in.conv.{end}": "decoder.conv_in.conv.{end}",
    "decoder.up.{up}.upsample.conv.{end}": "decoder.up_blocks.{up}.upsamplers.0.conv.{end}",
    **{f"decoder.norm_out.{part}": f"decoder.norm_out.{part}" for part in _NORMS},
    "decoder.conv_out.conv.{end}": "decoder.conv_out.conv.{end}",
    **{place + sat: where + ours for place, (where, parts) in _PLACES.items() for sat, ours in parts.items()},
    "loss.*": Dropped("part of the loss that the VAE was trained with"),
}

_ATTENTION, _OURS = "transformer.layers.{n}.attention.", "transformer_blocks.{n}.attn1."
LORA: Table = {
    f"{_ATTENTION}{sat}": f"{_OURS}{module}.lora_{side}.weight"
    for side in "AB"
    for sat, module in (
        (f"query_key_value.matrix_{side}.0", "to_q"),
        (f"query_key_value.matrix_{side}.1", "to_k"),
        (f"query_key_value.matrix_{side}.2", "to_v"),
        (f"dense.matrix_{side}.0", "to_out.0"),
    )
}


@dataclass(frozen=True)
class Piece:
    """Chunk number `chunk` of `of` equal chunks of a source tensor's rows."""

    source: str
    chunk: int = 0
    of: int = 1


@dataclass(kw_only=True)
class Plan:
    """How a file's tensors map to the other layout, by names alone."""

    outputs: dict[str, list[Piece]] = field(default_factory=dict)
    """New name -> the pieces whose rows are concatenated to the new tensor."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Old name -> why."""
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Old names without which an output would be incomplete."""


def plan_to_diffusers(names: list[str], table: Table, *, levels: int = 0) -> Plan:
    """Map SAT's names to diffusers'. `levels` is how many levels a VAE has, for `{up}`."""
    plan = Plan()
    for name in names:
        found = _found(name, tuple(table), levels)
        if found is None:
            plan.unknown.append(name)
            continue
        template, values = found
        match table[template]:
            case Dropped(reason):
                plan.dropped[name] = reason
            case Rows() as rows:
                for ours, chunks in zip(rows.names, rows.chunks, strict=True):
                    pieces = [Piece(name, chunk, rows.count) for chunk in chunks]
                    plan.outputs[_filled(ours, values)] = pieces
            case str(ours):
                plan.outputs[_filled(ours, values)] = [Piece(name)]
    return plan


def plan_to_sat(names: list[str], table: Table, *, levels: int = 0) -> Plan:
    """Map diffusers' names to SAT's by the same table."""
    plan, inverse = Plan(), _inverse(table)
    for name in names:
        found = _found(name, tuple(inverse), levels)
        if found is None:
            plan.unknown.append(name)
            continue
        template, values = found
        sat, rows, part = inverse[template]
        target = _filled(sat, values)
        if rows is None:
            plan.outputs[target] = [Piece(name)]
            continue
        # Start with the tensor that belongs in each chunk; those that the file does not have are missing.
        empty = [Piece(_filled(_owner(rows, chunk), values)) for chunk in range(rows.count)]
        pieces = plan.outputs.setdefault(target, empty)
        for place, chunk in enumerate(rows.chunks[part]):
            pieces[chunk] = Piece(name, place, len(rows.chunks[part]))
    known = set(names)
    sources = {piece.source: None for pieces in plan.outputs.values() for piece in pieces}
    plan.missing = [source for source in sources if source not in known]
    return plan


def sat_name(ours: str, table: Table, *, levels: int = 0) -> str | None:
    """Return the SAT tensor that holds a diffusers tensor; None when there is none."""
    inverse = _inverse(table)
    found = _found(ours, tuple(inverse), levels)
    return None if found is None else _filled(inverse[found[0]][0], found[1])


def shape_of(pieces: list[Piece], shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape of concatenated pieces. Raises ValueError when rows do not divide or do not match."""
    rows, rest = 0, None
    for piece in pieces:
        first, *others = shapes[piece.source] or (1,)
        if first % piece.of or (rest is not None and rest != others):
            raise ValueError(f"{piece.source} has the shape {list(shapes[piece.source])}")
        rows, rest = rows + first // piece.of, others
    return (rows, *(rest or ())) if shapes[pieces[0].source] else ()


def _owner(rows: Rows, chunk: int) -> str:
    return next(name for name, chunks in zip(rows.names, rows.chunks, strict=True) if chunk in chunks)


def _inverse(table: Table) -> dict[str, tuple[str, Rows | None, int]]:
    inverse: dict[str, tuple[str, Rows | None, int]] = {}
    for sat, ours in table.items():
        if isinstance(ours, Rows):
            inverse |= {name: (sat, ours, part) for part, name in enumerate(ours.names)}
        elif isinstance(ours, str):
            inverse[ours] = (sat, None, 0)
    return inverse


def _found(name: str, templates: tuple[str, ...], levels: int) -> tuple[str, list[str]] | None:
    for template in templates:
        if match := _pattern(template).fullmatch(name):
            marks = re.findall(r"\{(\w+)\}", template)
            values = match.groups()
            if "up" in marks:
                values = [
                    str(levels - 1 - int(value)) if mark == "up" else value
                    for mark, value in zip(marks, values, strict=True)
                ]
            return template, list(values)
    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    written = re.escape(template).replace(r"\*", ".*")
    written = re.sub(r"\\\{(?:n|up)\\\}", r"(0|[1-9][0-9]{0,3})", written)
    return re.compile(written.replace(r"\{end\}", "(weight|bias)"))


def _filled(template: str, values: list[str]) -> str:
    remaining = iter(values)
    return re.sub(r"\{\w+\}", lambda _: next(remaining), template)
