"""What a file is, and the sizes of the model in it, told from the names and shapes of its tensors alone."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from lib.convert.keymap import Shape
from lib.errors import UserError
from lib.models.specs import SPECS

Shapes = Mapping[str, Shape]
Kind = Literal["transformer", "vae", "lora", "other"]
Layout = Literal["sat", "diffusers"]
SECOND_PATCH = 2
"""Latents to a patch of 1.5, in time and along each side: its projection is linear and does not say it."""
NAMED = 3


@dataclass(frozen=True, slots=True)
class Sign:
    """A file with a tensor of this name is of this kind."""

    pattern: str
    kind: Kind
    layout: Layout | None
    label: str


SIGNS = tuple(
    Sign(*row)
    for row in (
        (r".*\.matrix_[AB]\.\d+", "lora", "sat", "a SAT LoRA"),
        (r"mixins\.patch_embed\.proj\.weight", "transformer", "sat", "a CogVideoX transformer of SAT"),
        (r"transformer\.layers\.\d+\.attention\.query_key_value\.weight", "transformer", "sat",
         "a transformer of SAT"),
        (r"encoder\.down\.\d+\.block\.\d+\.conv1\.conv\.weight", "vae", "sat", "a video VAE of SAT"),
        (r"decoder\.up\.\d+\.block\.\d+\.conv1\.conv\.weight", "vae", "sat", "a part of a video VAE of SAT"),
        (r".*[._]lora[._](?:A|B|up|down)\b.*", "lora", "diffusers", "a LoRA for diffusers"),
        (r"transformer_blocks\.\d+\.norm1\.linear\.weight", "transformer", "diffusers",
         "a CogVideoX transformer of diffusers"),
        (r"encoder\.down_blocks\.\d+\.resnets\.\d+\.conv1\.conv\.weight", "vae", "diffusers",
         "a CogVideoX VAE of diffusers"),
        (r"(?:input_blocks|output_blocks|middle_block|down_blocks|up_blocks)\.\d+\..*", "other", None,
         "a UNet, as of Stable Diffusion"),
        (r"(?:encoder|decoder)\.(?:down|up|down_blocks|up_blocks)\.\d+\..*", "other", None,
         "a VAE of images, as of Stable Diffusion"),
        (r"encoder\.block\.\d+\.layer\.\d+\.SelfAttention\..*", "other", None, "a T5 text encoder"),
        (r"(?:.*\.)?(?:patch_embedding|blocks\.\d+\.self_attn\.q)\.weight", "other", None,
         "a transformer of another family (Wan)"),
        (r"(?:.*\.)?(?:double_blocks|single_blocks|joint_blocks)\.\d+\..*", "other", None,
         "a transformer of another family (FLUX, HunyuanVideo or Stable Diffusion 3)"),
    )
)  # fmt: skip
LABELS: dict[str, str] = {
    "transformer": "a CogVideoX transformer",
    "vae": "a CogVideoX VAE",
    "lora": "a LoRA",
}


@dataclass(frozen=True, slots=True)
class Found:
    """What a file is."""

    kind: Kind
    layout: Layout | None
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSizes:
    """Everything about a transformer that its tensors say."""

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
    """Rows of a position embedding, 0 without one: learned by 5B-I2V, computed in fine-tuned 2B files."""
    rotary: bool | None
    """Whether its positions are rotary; None when no tensor says so."""

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
    """Everything about a VAE that its tensors say."""

    channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: int
    in_channels: int
    out_channels: int


def identify(names: Collection[str]) -> Found:
    """Tell what a file is by the names of its tensors."""
    for sign in SIGNS:
        pattern = re.compile(sign.pattern)
        if any(pattern.fullmatch(name) for name in names):
            return Found(sign.kind, sign.layout, sign.label)
    some = ", ".join(sorted(names)[:NAMED])[:200]
    return Found("other", None, f"no model that is known here (its tensors are {some} ...)")


def require(found: Found, kind: Kind, layout: Layout, *, name: str) -> None:
    """Raise UserError, saying what was found, unless a file is of this kind and layout."""
    if found.kind == kind and found.layout == layout:
        return
    other = {"sat": "diffusers", "diffusers": "SAT"}[layout]
    if found.kind == kind:
        here = {"sat": "SAT", "diffusers": "diffusers"}[layout]
        raise UserError(
            f"{name} is {found.label}: it is in the layout of {other} already. What is read here is the "
            f"layout of {here}; to go the other way, choose the other direction."
        )
    raise UserError(f"{name} is {found.label}; {LABELS[kind]} was expected.")


def transformer_sizes(shapes: Shapes, *, name: str) -> TransformerSizes:
    """The sizes of a transformer by SAT's names. Raises UserError when a tensor that shows one is missing."""
    look = _Look(shapes, name, "transformer")
    width, *patch = look.at("mixins.patch_embed.proj.weight", 2, 4)
    (head_dim,) = look.at("mixins.adaln_layer.query_layernorm_list.0.weight", 1)
    final, _ = look.at("mixins.final_layer.linear.weight", 2)
    if width % head_dim:
        raise UserError(f"{name}: its width of {width} is no multiple of its head size, {head_dim}.")
    second = len(patch) == 1
    if second:
        size, divisor = SECOND_PATCH, SECOND_PATCH**3
        in_channels, out_channels = patch[0] // divisor, final // divisor
    else:
        in_channels, size, _ = patch
        out_channels = final // size**2
    layers = _count(shapes, r"transformer\.layers\.(\d{1,4})\..*")
    for layer in range(layers):  # before a model of so many is made to compare with
        look.at(f"transformer.layers.{layer}.input_layernorm.weight", 1)
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
        patch_size_t=SECOND_PATCH if second else None,
        time_embed_dim=look.at("time_embed.0.weight", 2)[0],
        text_embed_dim=look.at("mixins.patch_embed.text_proj.weight", 2)[1],
        ofs_embed_dim=ofs[0] if ofs else None,
        positions=positions[1] if len(positions) == 3 else 0,
        rotary=rotary,
    )


def vae_levels(names: Collection[str]) -> int:
    """How many levels a VAE has, by SAT's names or diffusers'."""
    return _count(names, r"encoder\.down(?:_blocks)?\.(\d{1,4})\..*")


def vae_sizes(shapes: Shapes, *, name: str) -> VaeSizes:
    """The sizes of a VAE by SAT's names. Raises UserError when a tensor that shows one is missing."""
    look = _Look(shapes, name, "VAE")
    levels = range(vae_levels(shapes))
    blocks = range(_count(shapes, r"encoder\.down\.0\.block\.(\d{1,4})\..*"))
    for block in blocks:
        look.at(f"encoder.down.0.block.{block}.conv1.conv.weight", 5)
    return VaeSizes(
        channels=tuple(look.at(f"encoder.down.{level}.block.0.conv1.conv.weight", 5)[0] for level in levels),
        latent_channels=look.at("decoder.conv_in.conv.weight", 5)[1],
        layers_per_block=len(blocks),
        in_channels=look.at("encoder.conv_in.conv.weight", 5)[1],
        out_channels=look.at("decoder.conv_out.conv.weight", 5)[0],
    )


def family_of(sizes: TransformerSizes, *, given: str | None = None) -> str:
    """The released model whose kind a transformer is, of whatever size.

    Where no tensor tells the kinds of 2B and 5B apart, `given` may; without it a width of 5B's means 5B.
    Raises UserError when `given` is another kind than the tensors say.
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
            f"family={given} was given, but by its tensors the transformer is {variant(sizes, found)}. Leave "
            "family out: it is needed only for a VAE alone."
        )
    return found


def variant(sizes: TransformerSizes, family: str) -> str:
    """What to call a transformer: the released model's name, or its size and whose kind it is."""
    spec = SPECS[family]
    if (sizes.layers, sizes.width) == (spec.layers, spec.attention_width):
        return family
    return f"a CogVideoX of {sizes.layers} layers and width {sizes.width}, of the kind of {family}"


def _count(names: Collection[str], pattern: str) -> int:
    compiled = re.compile(pattern)
    return max((int(match[1]) + 1 for name in names if (match := compiled.fullmatch(name))), default=0)


@dataclass(frozen=True)
class _Look:
    """Shapes of tensors that have to be there."""

    shapes: Shapes
    name: str
    what: str

    def at(self, tensor: str, *dimensions: int) -> Shape:
        shape = self.shapes.get(tensor)
        if shape is None:
            raise UserError(f"{self.name} is not a whole {self.what}: it lacks {tensor}.")
        if len(shape) not in dimensions or not all(shape):
            raise UserError(f"{self.name} is no CogVideoX {self.what}: its {tensor} is {list(shape)}.")
        return shape
