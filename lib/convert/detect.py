"""Detect what a file holds, and the sizes of its model, from the names and shapes of its tensors alone."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lib.convert.keymap import Shape
from lib.errors import UserError
from lib.models.specs import SPECS

Shapes = Mapping[str, Shape]
Kind = Literal["transformer", "vae", "lora", "other"]
Layout = Literal["sat", "diffusers"]
TEMPORAL_PATCH = SPECS["cogvideox1.5-5b"].temporal_patch or 1
"""Latents per patch of 1.5, in time and along each side: its linear projection does not show them."""
LISTED = 3


SIGNATURES: tuple[tuple[str, Kind, Layout | None, str], ...] = (
    (r".*\.matrix_[AB]\.\d+", "lora", "sat", "a SAT LoRA"),
    (r"mixins\.patch_embed\.proj\.weight", "transformer", "sat", "a SAT CogVideoX transformer"),
    (r"transformer\.layers\.\d+\.attention\.query_key_value\.weight", "transformer", "sat",
     "a SAT transformer"),
    (r"encoder\.down\.\d+\.block\.\d+\.conv1\.conv\.weight", "vae", "sat", "a SAT video VAE"),
    (r"decoder\.up\.\d+\.block\.\d+\.conv1\.conv\.weight", "vae", "sat", "part of a SAT video VAE"),
    (r".*[._]lora(?:[._]|_linear_layer\.)(?:A|B|up|down)\b.*", "lora", "diffusers", "a diffusers LoRA"),
    (r"transformer_blocks\.\d+\.norm1\.linear\.weight", "transformer", "diffusers",
     "a diffusers CogVideoX transformer"),
    (r"encoder\.down_blocks\.\d+\.resnets\.\d+\.conv1\.conv\.weight", "vae", "diffusers",
     "a diffusers CogVideoX VAE"),
    (r"(?:input_blocks|output_blocks|middle_block|down_blocks|up_blocks)\.\d+\..*", "other", None,
     "a UNet, such as Stable Diffusion's"),
    (r"(?:encoder|decoder)\.(?:down|up|down_blocks|up_blocks)\.\d+\..*", "other", None,
     "an image VAE, such as Stable Diffusion's"),
    (r"encoder\.block\.\d+\.layer\.\d+\.SelfAttention\..*", "other", None, "a T5 text encoder"),
    (r"(?:.*\.)?(?:patch_embedding|blocks\.\d+\.self_attn\.q)\.weight", "other", None,
     "a transformer of another family (Wan)"),
    (r"(?:.*\.)?(?:double_blocks|single_blocks|joint_blocks)\.\d+\..*", "other", None,
     "a transformer of another family (FLUX, HunyuanVideo or Stable Diffusion 3)"),
)  # fmt: skip
"""A file with a tensor whose name matches the pattern is of this kind and layout, and is called this."""
LABELS: dict[str, str] = {
    "transformer": "a CogVideoX transformer",
    "vae": "a CogVideoX VAE",
    "lora": "a LoRA",
}


@dataclass(frozen=True, slots=True)
class Found:
    """The content of a file."""

    kind: Kind
    layout: Layout | None
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSizes:
    """The parts of a transformer's configuration that its tensors show."""

    heads: int
    head_dim: int
    layers: int
    in_channels: int
    out_channels: int
    patch_size: int
    patch_size_t: int | None
    time_embed_dim: int
    text_embed_dim: int
    ofs_embed_dim: int | None
    positions: int
    """Rows of the position embedding, 0 without one: learned in 5B-I2V, computed in fine-tuned 2B files."""
    rotary: bool | None
    """Whether its positions are rotary; None when no tensor shows it."""

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def image(self) -> bool:
        return self.in_channels == 2 * self.out_channels

    @property
    def learned_positions(self) -> bool:
        return bool(self.positions) and self.image and self.patch_size_t is None


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeSizes:
    """The parts of a VAE's configuration that its tensors show."""

    channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: int
    in_channels: int
    out_channels: int


def identify(names: Collection[str]) -> Found:
    """Return what a file holds, by the names of its tensors."""
    for pattern, kind, layout, label in SIGNATURES:
        if any(re.fullmatch(pattern, name) for name in names):
            return Found(kind, layout, label)
    some = ", ".join(sorted(names)[:LISTED])[:200]
    return Found("other", None, f"not a known model (its tensors are {some} ...)")


def require(found: Found, kind: Kind, layout: Layout, *, name: str) -> None:
    """Raise UserError, saying what was found, unless a file is of this kind and layout."""
    if found.kind == kind and found.layout == layout:
        return
    if found.kind == kind:
        wanted, other = ("SAT", "diffusers") if layout == "sat" else ("diffusers", "SAT")
        raise UserError(
            f"{name} is {found.label}: it is already in the {other} layout. The {wanted} layout is needed "
            "here; to convert back, choose the other direction."
        )
    raise UserError(f"{name} is {found.label}; {LABELS[kind]} was expected.")


def transformer_sizes(shapes: Shapes, *, name: str) -> TransformerSizes:
    """Return a transformer's sizes from SAT's tensors. Raises UserError when one of these is missing."""
    shape = partial(_shape, shapes, name, "transformer")
    width, *patch = shape("mixins.patch_embed.proj.weight", 2, 4)
    (head_dim,) = shape("mixins.adaln_layer.query_layernorm_list.0.weight", 1)
    final, _ = shape("mixins.final_layer.linear.weight", 2)
    if width % head_dim:
        raise UserError(f"{name}: its width of {width} is not a multiple of its head size, {head_dim}.")
    second = len(patch) == 1
    if second:
        size, divisor = TEMPORAL_PATCH, TEMPORAL_PATCH**3
        in_channels, out_channels = patch[0] // divisor, final // divisor
    else:
        in_channels, size, _ = patch
        out_channels = final // size**2
    layers = _count(shapes, r"transformer\.layers\.(\d{1,4})\..*")
    for layer in range(layers):  # before a model with that many is created to compare with
        shape(f"transformer.layers.{layer}.input_layernorm.weight", 1)
    ofs = shapes.get("ofs_embed.0.weight")
    positions = shapes.get("mixins.pos_embed.pos_embedding", (0, 0, 0))
    buffers = ("mixins.pos_embed.freqs_sin", "transformer.position_embeddings.weight")
    image = in_channels == 2 * out_channels
    rotary = True if second or image or any(buffer in shapes for buffer in buffers) else None
    if rotary is None and positions[1]:
        rotary = False
    return TransformerSizes(
        heads=width // head_dim,
        head_dim=head_dim,
        layers=layers,
        in_channels=in_channels,
        out_channels=out_channels,
        patch_size=size,
        patch_size_t=TEMPORAL_PATCH if second else None,
        time_embed_dim=shape("time_embed.0.weight", 2)[0],
        text_embed_dim=shape("mixins.patch_embed.text_proj.weight", 2)[1],
        ofs_embed_dim=ofs[0] if ofs else None,
        positions=positions[1] if len(positions) == 3 else 0,
        rotary=rotary,
    )


def vae_levels(names: Collection[str]) -> int:
    """Return how many levels a VAE has, by SAT's names or diffusers'."""
    return _count(names, r"encoder\.down(?:_blocks)?\.(\d{1,4})\..*")


def vae_sizes(shapes: Shapes, *, name: str) -> VaeSizes:
    """Return a VAE's sizes from SAT's tensors. Raises UserError when one of these is missing."""
    shape = partial(_shape, shapes, name, "VAE")
    levels = range(vae_levels(shapes))
    blocks = range(_count(shapes, r"encoder\.down\.0\.block\.(\d{1,4})\..*"))
    for block in blocks:
        shape(f"encoder.down.0.block.{block}.conv1.conv.weight", 5)
    return VaeSizes(
        channels=tuple(shape(f"encoder.down.{level}.block.0.conv1.conv.weight", 5)[0] for level in levels),
        latent_channels=shape("decoder.conv_in.conv.weight", 5)[1],
        layers_per_block=len(blocks),
        in_channels=shape("encoder.conv_in.conv.weight", 5)[1],
        out_channels=shape("decoder.conv_out.conv.weight", 5)[0],
    )


def family_of(sizes: TransformerSizes, *, given: str | None = None) -> str:
    """Return the released model to whose family a transformer of any size belongs.

    Where no tensor distinguishes the 2B and 5B families, `given` decides; without it the width of 5B means
    5B. Raises UserError when `given` contradicts the tensors.
    """
    task = "-i2v" if sizes.image else ""
    if sizes.patch_size_t is not None:
        found = f"cogvideox1.5-5b{task}"
    elif sizes.rotary is None and given in ("cogvideox-2b", "cogvideox-5b"):
        found = given
    elif sizes.rotary or sizes.width == SPECS["cogvideox-5b"].attention_width:
        found = f"cogvideox-5b{task}"
    else:
        found = "cogvideox-2b"
    if given is not None and given != found:
        raise UserError(
            f"family={given} was given, but its tensors show {variant(sizes, found)}. "
            "Leave family out: it is needed only for a VAE alone."
        )
    return found


def variant(sizes: TransformerSizes, family: str) -> str:
    """Return what to call a transformer: the released model's name, or its size and family."""
    spec = SPECS[family]
    if (sizes.layers, sizes.width) == (spec.layers, spec.attention_width):
        return family
    return f"a CogVideoX of {sizes.layers} layers and width {sizes.width}, of the {family} family"


def _count(names: Collection[str], pattern: str) -> int:
    compiled = re.compile(pattern)
    return max((int(match[1]) + 1 for name in names if (match := compiled.fullmatch(name))), default=0)


def _shape(shapes: Shapes, name: str, what: str, tensor: str, *dimensions: int) -> Shape:
    """Return the shape of a tensor that has to be present. Raises UserError otherwise."""
    shape = shapes.get(tensor)
    if shape is None:
        raise UserError(f"{name} is not a complete {what}: {tensor} is missing.")
    if len(shape) not in dimensions or not all(shape):
        raise UserError(f"{name} is not a CogVideoX {what}: its {tensor} is {list(shape)}.")
    return shape
