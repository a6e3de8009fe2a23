"""How large a model's parts are: widths and depths from its configurations, and the weights they make.

For a folder they are read from its config.json files; for a released checkpoint they follow from its
ModelSpec and what all of them share, so that plans can be made without a file of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.models.derive import read_config
from lib.models.specs import RELEASED_TEXT_ENCODER, RELEASED_VAE, ModelSpec

Parts = dict[str, int]
"""Numbers of weights: "linear" are those of matrix products, which quantisation shrinks, "other" the rest;
"rows" are the outputs of the products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerShape:
    """Of CogVideoXTransformer3DModel."""

    width: int
    head_size: int
    layers: int
    in_channels: int
    out_channels: int
    text_width: int
    text_tokens: int
    patch: int
    temporal_patch: int | None
    time_width: int
    ofs_width: int | None
    rotary: bool
    learned_positions: bool
    patch_bias: bool
    attention_bias: bool
    sample: tuple[int, int, int]
    """Latent frames, height and width whose positions are stored, where they are."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TransformerShape":
        """From transformer/config.json; what it leaves out is diffusers' default."""
        heads, head_size = config.get("num_attention_heads", 30), config.get("attention_head_dim", 64)
        frames = (config.get("sample_frames", 49) - 1) // config.get("temporal_compression_ratio", 4) + 1
        return cls(
            width=heads * head_size,
            head_size=head_size,
            layers=config.get("num_layers", 30),
            in_channels=config.get("in_channels", 16),
            out_channels=config.get("out_channels", 16),
            text_width=config.get("text_embed_dim", 4096),
            text_tokens=config.get("max_text_seq_length", 226),
            patch=config.get("patch_size", 2),
            temporal_patch=config.get("patch_size_t"),
            time_width=config.get("time_embed_dim", 512),
            ofs_width=config.get("ofs_embed_dim"),
            rotary=config.get("use_rotary_positional_embeddings", False),
            learned_positions=config.get("use_learned_positional_embeddings", False),
            patch_bias=config.get("patch_bias", True),
            attention_bias=config.get("attention_bias", True),
            sample=(frames, config.get("sample_height", 60), config.get("sample_width", 90)),
        )

    @property
    def block(self) -> Parts:
        """Of one block: projections of the attention, the feed-forward 4 times as wide, two modulations."""
        width, modulation = self.width, 6 * self.width
        linear = 4 * width**2 + 8 * width**2 + 2 * self.time_width * modulation
        rows = 4 * width + 5 * width + 2 * modulation
        biases = (4 if self.attention_bias else 1) * width + 5 * width + 2 * modulation
        return {"linear": linear, "rows": rows, "other": biases + 4 * width + 4 * self.head_size}

    @property
    def outside(self) -> Parts:
        """Of everything around the blocks."""
        width, time = self.width, self.time_width
        patch = self.in_channels * self.patch**2
        out = self.out_channels * self.patch**2 * (self.temporal_patch or 1)
        layers = [(self.text_width, width), (width, time), (time, time), (time, 2 * width), (width, out)]
        other = 4 * width  # two layer norms
        if self.ofs_width:
            layers += [(self.ofs_width, self.ofs_width)] * 2
        if self.temporal_patch is None:
            other += patch * width + (width if self.patch_bias else 0)
        else:
            layers.append((patch * self.temporal_patch, width))
        if self.learned_positions or not self.rotary:
            other += self.positions * width
        rows = sum(outputs for _, outputs in layers)
        return {"linear": sum(a * b for a, b in layers), "rows": rows, "other": other + rows}

    @property
    def positions(self) -> int:
        """Tokens of text and video whose positions are a stored tensor."""
        frames, height, width = self.sample
        return self.text_tokens + frames * (height // self.patch) * (width // self.patch)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderShape:
    """Of T5's encoder."""

    width: int
    layers: int
    heads: int
    head_size: int
    feed_forward: int
    gated: bool
    words: int
    buckets: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TextEncoderShape":
        """From text_encoder/config.json; what it leaves out is transformers' default."""
        return cls(
            width=config.get("d_model", 512),
            layers=config.get("num_layers", 6),
            heads=config.get("num_heads", 8),
            head_size=config.get("d_kv", 64),
            feed_forward=config.get("d_ff", 2048),
            gated=config.get("feed_forward_proj", "relu").startswith("gated"),
            words=config.get("vocab_size", 32128),
            buckets=config.get("relative_attention_num_buckets", 32),
        )

    @property
    def block(self) -> Parts:
        inner, gates = self.heads * self.head_size, 2 if self.gated else 1
        return {
            "linear": 4 * self.width * inner + (gates + 1) * self.width * self.feed_forward,
            "rows": 3 * inner + gates * self.feed_forward + 2 * self.width,
            "other": 2 * self.width,
        }

    @property
    def outside(self) -> Parts:
        return {"linear": 0, "rows": 0, "other": (self.words + 1) * self.width + self.buckets * self.heads}


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeShape:
    """Of AutoencoderKLCogVideoX."""

    channels: tuple[int, ...]
    latent_channels: int
    layers: int
    """Residual blocks of a level of the encoder; the decoder has one more."""
    compressed_levels: int
    """Levels that halve time as well."""
    tile: tuple[int, int]
    """Height and width in pixels of what tiling decodes at once."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VaeShape":
        """From vae/config.json; what it leaves out is diffusers' default."""
        ratio = config.get("temporal_compression_ratio", 4)
        return cls(
            channels=tuple(config.get("block_out_channels", (128, 256, 256, 512))),
            latent_channels=config.get("latent_channels", 16),
            layers=config.get("layers_per_block", 3),
            compressed_levels=int(ratio).bit_length() - 1,
            tile=(config.get("sample_height", 480) // 2, config.get("sample_width", 720) // 2),
        )

    @property
    def spatial_ratio(self) -> int:
        return 2 ** (len(self.channels) - 1)

    @property
    def temporal_ratio(self) -> int:
        return 2**self.compressed_levels

    @property
    def weights(self) -> int:
        return self._encoder() + self._decoder()

    def _encoder(self) -> int:
        first, last = self.channels[0], self.channels[-1]
        total = _conv(3, first, 27) + 2 * self._residual(last, last, None)
        for level, (before, after) in enumerate(zip((first, *self.channels), self.channels, strict=False)):
            total += self._residual(before, after, None) + (self.layers - 1) * self._residual(
                after, after, None
            )
            total += _conv(after, after, 9) if level < len(self.channels) - 1 else 0
        return total + 2 * last + _conv(last, 2 * self.latent_channels, 27)

    def _decoder(self) -> int:
        levels, latent = self.channels[::-1], self.latent_channels
        total = _conv(latent, levels[0], 27) + 2 * self._residual(levels[0], levels[0], latent)
        for level, (before, after) in enumerate(zip((levels[0], *levels), levels, strict=False)):
            total += self._residual(before, after, latent) + self.layers * self._residual(
                after, after, latent
            )
            total += _conv(after, after, 9) if level < len(levels) - 1 else 0
        return total + self._norm(levels[-1], latent) + _conv(levels[-1], 3, 27)

    def _residual(self, before: int, after: int, latent: int | None) -> int:
        shortcut = _conv(before, after, 1) if before != after else 0
        norms = self._norm(before, latent) + self._norm(after, latent)
        return norms + _conv(before, after, 27) + _conv(after, after, 27) + shortcut

    def _norm(self, channels: int, latent: int | None) -> int:
        return 2 * channels + (2 * _conv(latent, channels, 1) if latent else 0)


def _conv(before: int, after: int, window: int) -> int:
    return before * after * window + after


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The three parts that have weights."""

    transformer: TransformerShape
    text_encoder: TextEncoderShape
    vae: VaeShape

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelShape":
        """Of a diffusers folder. Raises UserError when a configuration is missing."""
        return cls(
            transformer=TransformerShape.from_config(read_config(folder / "transformer" / "config.json")),
            text_encoder=TextEncoderShape.from_config(read_config(folder / "text_encoder" / "config.json")),
            vae=VaeShape.from_config(read_config(folder / "vae" / "config.json")),
        )

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> "ModelShape":
        """Of a diffusers pipeline in memory."""
        return cls(
            transformer=TransformerShape.from_config(dict(pipeline.transformer.config)),
            text_encoder=TextEncoderShape.from_config(pipeline.text_encoder.config.to_dict()),
            vae=VaeShape.from_config(dict(pipeline.vae.config)),
        )

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> "ModelShape":
        """Of a released checkpoint, without any of its files."""
        return cls(
            transformer=TransformerShape.from_config(released_transformer(spec)),
            text_encoder=TextEncoderShape.from_config(RELEASED_TEXT_ENCODER),
            vae=VaeShape.from_config(RELEASED_VAE),
        )


def released_transformer(spec: ModelSpec) -> dict[str, Any]:
    """What a released checkpoint's transformer/config.json says beside diffusers' defaults."""
    image = spec.task == "i2v"
    return {
        "num_attention_heads": spec.attention_width // 64,
        "num_layers": spec.layers,
        "in_channels": RELEASED_VAE["latent_channels"] * (2 if image else 1),
        "text_embed_dim": RELEASED_TEXT_ENCODER["d_model"],
        "max_text_seq_length": spec.text_tokens,
        "patch_size_t": spec.temporal_patch,
        "patch_bias": spec.temporal_patch is None,
        "ofs_embed_dim": 512 if image and spec.temporal_patch else None,
        "use_rotary_positional_embeddings": spec.rotary_positions,
        "use_learned_positional_embeddings": image and spec.size_rule == "fixed",
        "sample_frames": spec.frames,
        "sample_height": spec.height // 8,
        "sample_width": spec.width // 8,
    }
