"""A released checkpoint's shape with random weights, as a diffusers folder."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from bench._random_base import bfloat16
from lib.memory.configs import released_transformer
from lib.models.derive import read_config
from lib.models.specs import RELEASED_TEXT_ENCODER, RELEASED_VAE, ModelSpec

TINY = Path(__file__).resolve().parent.parent / "weights"
TRY_OUT = {
    "transformer": {"num_attention_heads": 2, "sample_height": 8, "sample_width": 12, "sample_frames": 17},
    "vae": {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 2},
}
"""The same layout small enough for a CPU."""


def write_random_model(
    folder: Path,
    spec: ModelSpec,
    changes: dict[str, dict],
    *,
    layers: int | None = None,
    text_layers: int | None = None,
) -> Path:
    """Write the model in bfloat16 to a new folder and return the folder.

    `changes` override its configs, by component. Tokenizer and scheduler are the embedded model's, on which
    the time of a request does not depend.
    """
    encoder = RELEASED_TEXT_ENCODER | changes.get("text_encoder", {})
    config = released_transformer(spec) | changes.get("transformer", {})
    config |= {"num_layers": layers or config["num_layers"], "text_embed_dim": encoder["d_model"]}
    encoder |= {"num_layers": text_layers or encoder["num_layers"]}
    vae = RELEASED_VAE | {"scaling_factor": spec.scaling_factor} | changes.get("vae", {})
    tiny = TINY / f"tiny-{spec.task}"
    torch.manual_seed(0)
    with bfloat16(), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        CogVideoXTransformer3DModel(**config).save_pretrained(folder / "transformer")
        AutoencoderKLCogVideoX(**vae).save_pretrained(folder / "vae")
        T5EncoderModel(T5Config(**encoder)).save_pretrained(folder / "text_encoder")
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(tiny / part, folder / part)
    shutil.copy(tiny / "model_index.json", folder)
    return folder


def step_flops(folder: Path) -> float:
    """Return the floating point operations of one guided step for the model's default clip.

    For both branches: 24 D^2 per token and layer for the matrix products, 4 S D for attention, and 24 D times
    the width of the time embedding for the modulations, where D is the width and S the sequence length.
    """
    config = read_config(folder / "transformer" / "config.json")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, temporal = config["patch_size"], config.get("patch_size_t") or 1
    frames = -(-((config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1) // temporal)
    video = frames * (config["sample_height"] // patch) * (config["sample_width"] // patch)
    sequence = video + config["max_text_seq_length"]
    layer = sequence * 24 * width**2 + 4 * sequence**2 * width + 24 * width * config["time_embed_dim"]
    return 2.0 * config["num_layers"] * layer
