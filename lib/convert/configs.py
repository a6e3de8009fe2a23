"""The configuration of a converted model, without the values that are diffusers' defaults.

What cannot be read from the weights (the size of the clips, the VAE's scaling, the noise schedule) comes from
the family's ModelSpec and can be overridden.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

from lib.convert.detect import TransformerSizes, VaeSizes
from lib.errors import UserError
from lib.models.specs import RELEASED_VAE, SPECS, ModelSpec

VAE_RATIO = 2 ** (len(cast("tuple[int, ...]", RELEASED_VAE["block_out_channels"])) - 1)
"""Pixels per latent, along each side."""
TEMPORAL_RATIO = cast("int", RELEASED_VAE["temporal_compression_ratio"])
TRANSFORMER_OPTIONS = (
    "sample_height",
    "sample_width",
    "sample_frames",
    "max_text_seq_length",
    "spatial_interpolation_scale",
    "temporal_interpolation_scale",
)
VAE_OPTIONS = ("norm_num_groups", "scaling_factor", "invert_scale_latents")
SCHEDULER_OPTIONS = ("snr_shift_scale",)
OPTIONS = (*TRANSFORMER_OPTIONS, *VAE_OPTIONS, *SCHEDULER_OPTIONS)
"""Configuration values that can be overridden, because they cannot be read from the weights."""
Options = Mapping[str, float | int | bool]
FAMILIES = {name: spec for name, spec in SPECS.items() if spec.scaling_factor is not None}
"""The released models that weights are converted to, by name."""


def check_options(options: Options) -> None:
    """Raise UserError for an option that cannot be overridden or is not a number above 0."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise UserError(f"{name}={value} cannot be overridden; allowed are {', '.join(OPTIONS)}.")
        number = isinstance(value, (int, float)) and (name == "invert_scale_latents" or value > 0)
        if not number:
            raise UserError(f"{name}={value!r} is not supported; it has to be a number above 0.")


def check_alpha(alpha: float | None) -> None:
    """Raise UserError unless a LoRA's alpha is a number above 0."""
    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"alpha={alpha} is not supported; it has to be a number above 0. SAT's default is 1.")


def transformer_config(sizes: TransformerSizes, family: ModelSpec, options: Options) -> dict[str, Any]:
    """Return transformer/config.json. Raises UserError when learned positions do not fit the clip's size."""
    config: dict[str, Any] = {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "time_embed_dim": sizes.time_embed_dim,
        "ofs_embed_dim": sizes.ofs_embed_dim,
        "text_embed_dim": sizes.text_embed_dim,
        "num_layers": sizes.layers,
        "sample_width": family.nominal_sample or family.width // VAE_RATIO,
        "sample_height": family.nominal_sample or family.height // VAE_RATIO,
        "sample_frames": family.frames,
        "patch_size": sizes.patch_size,
        "patch_size_t": sizes.patch_size_t,
        "max_text_seq_length": family.text_tokens,
        "use_rotary_positional_embeddings": family.rotary_positions,
        "use_learned_positional_embeddings": sizes.learned_positions,
        "patch_bias": sizes.patch_size_t is None,
    }
    config |= {name: options[name] for name in TRANSFORMER_OPTIONS if name in options}
    if sizes.learned_positions:
        _check_positions(sizes.positions, config)
    return config


def _check_positions(found: int, config: Mapping[str, Any]) -> None:
    frames = (config["sample_frames"] - 1) // TEMPORAL_RATIO + 1
    height, width = (config[f"sample_{side}"] // config["patch_size"] for side in ("height", "width"))
    expected = config["max_text_seq_length"] + frames * height * width
    if expected != found:
        used = ", ".join(f"{name}={config[name]}" for name in TRANSFORMER_OPTIONS[:4])
        raise UserError(
            f"The transformer has {found} learned positions, but a clip of this size has {expected}: {used}. "
            f"Give the values it was trained with (height and width in latents of {VAE_RATIO} pixels)."
        )


def vae_config(sizes: VaeSizes, family: ModelSpec, options: Options) -> dict[str, Any]:
    """Return vae/config.json. Raises UserError when the channels do not divide into the norms' groups."""
    levels = len(sizes.channels)
    config: dict[str, Any] = {
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "block_out_channels": list(sizes.channels),
        "latent_channels": sizes.latent_channels,
        "layers_per_block": sizes.layers_per_block,
        "norm_num_groups": 32,
        "scaling_factor": family.scaling_factor,
        "invert_scale_latents": family.invert_scale_latents,
    }
    config |= {name: options[name] for name in VAE_OPTIONS if name in options}
    groups = config["norm_num_groups"]
    if odd := [width for width in sizes.channels if width % groups]:
        raise UserError(
            f"norm_num_groups={groups} does not divide the VAE's {odd[0]} channels; give the number that it "
            "was trained with: overrides=norm_num_groups=NUMBER."
        )
    return config


def scheduler_config(family: ModelSpec, options: Options) -> dict[str, Any]:
    """Return scheduler/scheduler_config.json: all CogVideoX models have the same noise schedule."""
    return {
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": options.get("snr_shift_scale", family.snr_shift_scale),
    }


def model_index() -> dict[str, Any]:
    """Return model_index.json. It names all five components; missing ones are passed to from_pretrained."""
    return {
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
