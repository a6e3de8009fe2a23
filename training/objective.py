"""One training step as pure functions of tensors: the transformer's inputs, and the loss.

The inputs equal those of diffusers' CogVideoX pipelines at prediction, so that a LoRA learns under the
conditions in which it is used. Latents are [B, f, C, h, w], scaled by the VAE's factor.
"""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

Rotary = tuple[torch.Tensor, torch.Tensor]

OFS = 2.0
"""The one value that CogVideoX1.5-5B-I2V was trained with, and that its pipeline feeds."""
IMAGE_NOISE_MEAN, IMAGE_NOISE_DEVIATION = -3.0, 0.5
"""Of the logarithm of the first frame's noise level, in pixels of -1..1 (CogVideoX paper, section 3.2)."""


def noised(latents: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return sqrt(a) z + sqrt(1 - a) eps in float32; `alphas_cumprod` holds each sample's a, [B].

    bf16 would round sqrt(1 - a) to zero at the first timesteps.
    """
    signal, deviation = _coefficients(alphas_cumprod, latents)
    return signal * latents.float() + deviation * noise.float()


def velocity(latents: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return the model's target sqrt(a) eps - sqrt(1 - a) z in float32 (Salimans & Ho 2022)."""
    signal, deviation = _coefficients(alphas_cumprod, latents)
    return signal * noise.float() - deviation * latents.float()


def losses(
    predicted: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """Return the mean squared error of the velocity of each sample, float32 [B].

    It equals the x0 error weighted by 1 / (1 - a), which the original code uses.
    """
    return mean_squares(predicted.float() - velocity(latents, noise, alphas_cumprod))


def mean_squares(error: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each sample [B, ...]: [B]."""
    return error.pow(2).mean(dim=tuple(range(1, error.ndim)))


def padded_in_front(latents: torch.Tensor, temporal_patch: int | None) -> torch.Tensor:
    """Prepend copies of the first frame until f is divisible by the temporal patch.

    CogVideoX1.5 patches two latent frames; its pipelines drop the same frames after denoising.
    """
    missing = -latents.shape[1] % (temporal_patch or 1)
    return torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1)


def model_input(noisy_latents: torch.Tensor, image_latents: torch.Tensor | None) -> torch.Tensor:
    """Return [B, f, C, h, w] for text to video, [B, f, 2C, h, w] for image to video (noisy latents first).

    The first frame's latents [B, 1, C, h, w] are padded with zeros to f.
    """
    if image_latents is None:
        return noisy_latents
    after = noisy_latents.shape[1] - image_latents.shape[1]
    condition = torch.nn.functional.pad(image_latents, (0, 0, 0, 0, 0, 0, 0, after))
    return torch.cat([noisy_latents, condition.to(noisy_latents)], dim=2)


def rotary_tables(config: Any, latent_shape: torch.Size, device: torch.device) -> Rotary | None:
    """Return the cos and sin tables for padded latents of shape [B, f, C, h, w], as the pipelines make them.

    `config` is the transformer's. 1.0 fits the grid into the trained one; 1.5 slices it from the largest.
    None for a model without rotary positions (2B).
    """
    if not config.use_rotary_positional_embeddings:
        return None
    frames, height, width = latent_shape[1], latent_shape[3], latent_shape[4]
    grid = (height // config.patch_size, width // config.patch_size)
    base = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    if config.patch_size_t is None:
        options = {
            "crops_coords": get_resize_crop_region_for_grid(grid, base[1], base[0]),
            "temporal_size": frames,
        }
    else:
        patch = config.patch_size_t
        options = {
            "crops_coords": None,
            "temporal_size": (frames + patch - 1) // patch,
            "grid_type": "slice",
            "max_size": base,
        }
    tables: Any = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim, grid_size=grid, device=device, **options
    )
    return tables


def offset(config: Any, like: torch.Tensor) -> torch.Tensor | None:
    """Return the ofs input of CogVideoX1.5-5B-I2V, [1]; None for models without its embedding."""
    return None if config.ofs_embed_dim is None else like.new_full((1,), OFS)


def noisy_image(image: torch.Tensor, deviation: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Add noise of `deviation` [B] to the first frame [B, 3, 1, H, W] in -1..1; the frame stays."""
    return image + deviation.view(-1, 1, 1, 1, 1).to(image) * noise.to(image)


def image_noise_deviation(drawn: float) -> torch.Tensor:
    """Return the standard deviation of a first frame's noise from a standard normal number."""
    return torch.tensor(np.exp(IMAGE_NOISE_MEAN + IMAGE_NOISE_DEVIATION * drawn), dtype=torch.float32)


def image_factor(vae: AutoencoderKLCogVideoX) -> float:
    """Return the factor of a first frame's latents; CogVideoX1.5 was trained with the inverse."""
    config: Any = vae.config
    return 1 / config.scaling_factor if config.invert_scale_latents else config.scaling_factor


def project_in_float32(projection: torch.nn.Module) -> None:
    """Run a projection outside autocast: torch 2.13's bf16 convolution of 16 channels is wrong on CPUs."""
    forward = projection.forward

    def in_float32(latents: torch.Tensor) -> torch.Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return forward(latents.float())

    projection.forward = in_float32


def _coefficients(alphas_cumprod: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alphas = alphas_cumprod.to(like.device, torch.float32).view(-1, *[1] * (like.ndim - 1))
    return alphas.sqrt(), (1 - alphas).sqrt()
