"""Configurations of a model's parts: of a folder, or of a released checkpoint without its files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lib.models.derive import read_config
from lib.models.specs import RELEASED_TEXT_ENCODER, RELEASED_VAE, ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfigs:
    """Configurations as JSON, by which what was measured is cached; what they leave out is the default."""

    transformer: str
    text_encoder: str
    vae: str

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read a diffusers folder. Raises UserError when a configuration is missing."""
        return cls._of(*(read_config(folder / part / "config.json") for part in cls.__slots__))

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> Self:
        """Return the configurations of a released checkpoint."""
        return cls._of(released_transformer(spec), RELEASED_TEXT_ENCODER, RELEASED_VAE)

    @classmethod
    def _of(cls, *parts: dict[str, Any]) -> Self:
        transformer, text_encoder, vae = (json.dumps(part, sort_keys=True) for part in parts)
        return cls(transformer=transformer, text_encoder=text_encoder, vae=vae)


def released_transformer(spec: ModelSpec) -> dict[str, Any]:
    """Return the settings of a released transformer/config.json that differ from diffusers' defaults."""
    image = spec.task == "i2v"
    return {
        "num_attention_heads": (spec.attention_width or 0) // 64,
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
