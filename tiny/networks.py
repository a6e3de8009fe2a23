"""The architectures of the embedded models: diffusers' and transformers' classes at tiny sizes."""

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from tiny.world import FRAMES, HEIGHT, WIDTH

LATENT_CHANNELS = 8
SPATIAL_RATIO = 4  # three VAE blocks: two halvings
TEMPORAL_RATIO = 4
TEXT_TOKENS = 20
TEXT_WIDTH = 64
HEADS, HEAD_DIM, LAYERS, PATCH = 6, 32, 6, 4

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def latent_shape(frames: int = FRAMES) -> tuple[int, int, int, int]:
    """Return the shape of a clip's latents, [latent frames, channels, height, width]."""
    return (
        (frames - 1) // TEMPORAL_RATIO + 1,
        LATENT_CHANNELS,
        HEIGHT // SPATIAL_RATIO,
        WIDTH // SPATIAL_RATIO,
    )


def build_vae(scaling_factor: float = 1.0) -> AutoencoderKLCogVideoX:
    """Build a VAE with 4x compression in space and time. Its sample size is 480x720, which tiling needs."""
    blocks = (16, 32, 64)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * len(blocks),
        up_block_types=("CogVideoXUpBlock3D",) * len(blocks),
        block_out_channels=blocks,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=TEMPORAL_RATIO,
        sample_height=480,
        sample_width=720,
        scaling_factor=scaling_factor,
    )


def build_transformer(in_channels: int = LATENT_CHANNELS) -> CogVideoXTransformer3DModel:
    """Build a transformer with rotary and absolute positions, like CogVideoX-5B-I2V.

    The absolute positions are the 3D sine-cosine ones and not trained, so that they agree with those that
    diffusers computes for other frame counts. adaLN and output layers are initialized to zero, which makes
    every block the identity.
    """
    _, _, height, width = latent_shape()
    model = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        patch_size=PATCH,
        time_embed_dim=128,
        text_embed_dim=TEXT_WIDTH,
        max_text_seq_length=TEXT_TOKENS,
        sample_height=height,
        sample_width=width,
        sample_frames=FRAMES,
        temporal_compression_ratio=TEMPORAL_RATIO,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    model.patch_embed.pos_embedding.requires_grad_(False)
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """Build a T5 v1.1 encoder of two layers, trained together with the transformer."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)
