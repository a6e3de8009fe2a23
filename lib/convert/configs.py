"""The configuration files of a converted model, as diffusers writes them for the released ones.

What the tensors do not say (the size of the clips, the VAE's scaling, the schedule of the noise) is the
family's, and can be given.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.convert.detect import TransformerSizes, VaeSizes
from lib.errors import UserError
from lib.models.specs import SPECS, ModelSpec

VAE_RATIO = 8
"""Pixels to a latent, along each side."""
SECOND_SAMPLE = 300
"""Latents to a side in the released configurations of 1.5, whatever the clip: a nominal size."""
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
"""What may be given, because no tensor says it."""
Options = Mapping[str, float | int | bool]


FAMILIES = {name: spec for name, spec in SPECS.items() if spec.scaling_factor is not None}
"""The released models: what all checkpoints of one share and none of its tensors says, by its name."""


def family_named(name: str) -> ModelSpec:
    """A family by its name. Raises UserError with the names there are."""
    if name not in FAMILIES:
        raise UserError(f"family={name} is unknown; allowed are {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def check_options(options: Options) -> None:
    """Raise UserError for a setting that the tensors decide, or that there is not, and for values no size."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise UserError(f"{name}={value} cannot be given; what no tensor says is {', '.join(OPTIONS)}.")
        number = isinstance(value, (int, float)) and (name == "invert_scale_latents" or value > 0)
        if not number:
            raise UserError(f"{name}={value!r} is not possible; it has to be a number above 0.")


def transformer_config(sizes: TransformerSizes, family: ModelSpec, options: Options) -> dict[str, Any]:
    """transformer/config.json. Raises UserError when learned positions are not those of the clip's size."""
    second = sizes.patch_size_t is not None
    config = {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embed_dim": sizes.time_embed_dim,
        "ofs_embed_dim": sizes.ofs_embed_dim,
        "text_embed_dim": sizes.text_embed_dim,
        "num_layers": sizes.layers,
        "dropout": 0.0,
        "attention_bias": True,
        "sample_width": SECOND_SAMPLE if second else family.width // VAE_RATIO,
        "sample_height": SECOND_SAMPLE if second else family.height // VAE_RATIO,
        "sample_frames": family.frames,
        "patch_size": sizes.patch_size,
        "patch_size_t": sizes.patch_size_t,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": family.text_tokens,
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
        "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": family.rotary_positions,
        "use_learned_positional_embeddings": sizes.learned_positions,
        "patch_bias": not second,
    }
    config |= {name: options[name] for name in TRANSFORMER_OPTIONS if name in options}
    if sizes.learned_positions:
        _check_positions(sizes.positions, config)
    return config


def _check_positions(found: int, config: Mapping[str, Any]) -> None:
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    height, width = (config[f"sample_{side}"] // config["patch_size"] for side in ("height", "width"))
    expected = config["max_text_seq_length"] + frames * height * width
    if expected != found:
        given = {name: config[name] for name in TRANSFORMER_OPTIONS[:4]}
        raise UserError(
            f"The transformer has {found} learned positions, and a clip of its kind has {expected}: "
            f"{', '.join(f'{name}={value}' for name, value in given.items())}. Give those it was trained "
            "with (height and width in latents, which are 8 pixels)."
        )


def vae_config(sizes: VaeSizes, family: ModelSpec, options: Options) -> dict[str, Any]:
    """vae/config.json. Raises UserError when the channels do not divide into the norms' groups."""
    levels = len(sizes.channels)
    config = {
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "block_out_channels": list(sizes.channels),
        "latent_channels": sizes.latent_channels,
        "layers_per_block": sizes.layers_per_block,
        "act_fn": "silu",
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "temporal_compression_ratio": 4,
        "sample_height": 480,
        "sample_width": 720,
        "scaling_factor": family.scaling_factor,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "invert_scale_latents": family.invert_scale_latents,
    }
    config |= {name: options[name] for name in VAE_OPTIONS if name in options}
    groups = config["norm_num_groups"]
    if odd := [width for width in sizes.channels if width % groups]:
        raise UserError(
            f"norm_num_groups={groups} does not divide the VAE's {odd[0]} channels; give the one that it was "
            "trained with, overrides=norm_num_groups=NUMBER."
        )
    return config


def scheduler_config(family: ModelSpec, options: Options) -> dict[str, Any]:
    """scheduler/scheduler_config.json: the schedule of the noise that all of them were trained with."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": "v_prediction",
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": options.get("snr_shift_scale", family.snr_shift_scale),
    }


def model_index() -> dict[str, Any]:
    """model_index.json. It names all five components; what is not there is given at loading."""
    return {
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def write_json(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a configuration of the class `kind` as diffusers does: sorted, with its version."""
    import diffusers

    whole = {"_class_name": kind, "_diffusers_version": diffusers.__version__, **content}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path.chmod(0o644)
