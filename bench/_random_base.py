"""A diffusers folder of CogVideoX's classes with random weights, in a released shape or a small one."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny-i2v"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """An image-to-video model."""

    transformer: dict
    """Its settings that differ from diffusers' defaults, which are those of CogVideoX-2B."""
    vae: dict
    """The same for the VAE."""
    text_width: int
    """Width of the text encoder's output."""


_BOTH = {
    "attention_head_dim": 64,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
}
FIVE_B = Shape(
    transformer=_BOTH
    | {
        "num_attention_heads": 48,
        "num_layers": 42,
        "in_channels": 32,
        "out_channels": 16,
        "sample_height": 60,
        "sample_width": 90,
        "sample_frames": 49,
    },
    vae={"scaling_factor": 0.7},
    text_width=4096,
)
"""CogVideoX-5B-I2V."""
SMALL = Shape(
    transformer=_BOTH
    | {
        "num_attention_heads": 2,
        "num_layers": 2,
        "in_channels": 8,
        "out_channels": 4,
        "sample_height": 4,
        "sample_width": 6,
        "sample_frames": 9,
    },
    vae={
        "scaling_factor": 0.7,
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    text_width=32,
)
"""The same layout at 9 frames of 48x32, for a CPU."""


def write_random_base(folder: Path, shape: Shape, *, device: str) -> Path:
    """Write the model in bfloat16 to a new folder and return the folder.

    The text encoder has the right width and almost no depth, since it leaves memory before training starts.
    Tokenizer and scheduler are those of tiny-i2v.
    """
    torch.manual_seed(0)
    with bfloat16(), torch.device(device):
        width = shape.text_width
        transformer = CogVideoXTransformer3DModel(**shape.transformer, text_embed_dim=width)
        transformer.save_pretrained(folder / "transformer")
        del transformer
        AutoencoderKLCogVideoX(**shape.vae).save_pretrained(folder / "vae")
        config = T5Config.from_pretrained(TINY / "text_encoder", local_files_only=True, d_model=width)
        T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(TINY / part, folder / part)
    shutil.copy(TINY / "model_index.json", folder)
    return folder


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    """Create new parameters in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
