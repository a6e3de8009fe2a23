"""CogVideoX's layouts at few channels and layers, and a trainer's configuration and plan around them."""

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from lib.models.specs import SPECS
from tiny.networks import SCHEDULER
from training.clips import Sampling
from training.config import TrainingConfig
from training.plan import Plan

CHANNELS = 4
TEXT_WIDTH = 12

# What tells the released transformers apart: positions, temporal patch, ofs, trained size in latents.
LAYOUTS = {
    "2b": {"use_rotary_positional_embeddings": False, "sample_height": 60, "sample_width": 90},
    "5b": {"use_rotary_positional_embeddings": True, "sample_height": 60, "sample_width": 90},
    "5b-i2v": {
        "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True,
        "sample_height": 60, "sample_width": 90,
    },
    "1.5-5b": {
        "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False, "sample_frames": 81,
        "sample_height": 300, "sample_width": 300, "max_text_seq_length": 224,
    },
    "1.5-5b-i2v": {
        "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False, "sample_frames": 81,
        "sample_height": 300, "sample_width": 300, "max_text_seq_length": 224, "ofs_embed_dim": 32,
    },
}  # fmt: skip


def is_i2v(layout: str) -> bool:
    return layout.endswith("i2v")


def transformer(layout: str, **changes) -> CogVideoXTransformer3DModel:
    """A random transformer of a released layout; `changes` are its configuration's."""
    options = {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "time_embed_dim": 32,
        "in_channels": CHANNELS * (2 if is_i2v(layout) else 1), "out_channels": CHANNELS,
        "text_embed_dim": TEXT_WIDTH, "patch_size": 2, "sample_frames": 49, "max_text_seq_length": 226,
    }  # fmt: skip
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**options | LAYOUTS[layout] | changes).eval()


def vae(*, scaling_factor: float = 0.7, inverted: bool = False) -> AutoencoderKLCogVideoX:
    """Eight times smaller in space and four times in time, as the released one."""
    torch.manual_seed(1)
    model = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(2, 2, 2, 2),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,
        scaling_factor=scaling_factor,
        invert_scale_latents=inverted,
    )
    return model.eval().requires_grad_(False)


def pipeline(layout: str, **changes) -> CogVideoXPipeline | CogVideoXImageToVideoPipeline:
    """diffusers' pipeline of a layout without its text encoder."""
    kind = CogVideoXImageToVideoPipeline if is_i2v(layout) else CogVideoXPipeline
    made = kind(
        tokenizer=None,
        text_encoder=None,
        vae=vae(inverted=layout == "1.5-5b-i2v"),
        transformer=transformer(layout, **changes),
        scheduler=CogVideoXDDIMScheduler(**SCHEDULER),
    )
    made.set_progress_bar_config(disable=True)
    return made


def config(**settings) -> TrainingConfig:
    return TrainingConfig.from_inputs(**({"input_videos": "clips"} | settings))


def sampling(**changes) -> Sampling:
    standard = {
        "fps": 8, "frame_step": 8, "max_frames": 9, "width": 64, "height": 48, "fit": "center",
        "random_crops": 1, "flip": False, "skip_frames_start": 0, "skip_frames_end": 0,
        "long_clips": "split", "seed": 0,
    }  # fmt: skip
    return Sampling(**standard | changes)


def plan(base: str = "tiny-i2v", *, folder: Path = Path("nowhere"), **fields) -> Plan:
    """A run on a CPU; `fields` are those of the plan."""
    standard = {
        "device": "cpu", "precision": "no", "gradient_checkpointing": False, "sampling": sampling(),
        "seed": 7, "spec": SPECS.get(base),
    }  # fmt: skip
    return Plan(base=base, folder=folder, **standard | fields)


def config_and_plan(base: str = "tiny-i2v", **settings) -> tuple[TrainingConfig, Plan]:
    """A run on a CPU; `settings` are the configuration's, or fields of the plan."""
    names = ("device", "precision", "gradient_checkpointing", "sampling", "seed", "spec", "folder")
    fields = {name: settings.pop(name) for name in names if name in settings}
    return config(**settings), plan(base, **fields)


def data(sections: list, **changes) -> SimpleNamespace:
    standard = {"sections": sections, "left_out": [], "encodings": None, "vae": None, "captions": []}
    return SimpleNamespace(**standard | changes)
