"""lib/pipelines/convolution.py: the same bits as PyTorch's own convolution, in fewer steps."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX

from lib.pipelines.convolution import install, unfolded_conv3d


@pytest.mark.parametrize("channels, outputs", [(1, 1), (3, 16), (8, 64), (32, 24)])
@pytest.mark.parametrize(
    "kernel, padding", [((1, 1, 1), (0, 0, 0)), ((3, 3, 3), (0, 1, 1)), ((3, 1, 3), (1, 0, 2))]
)
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_by_columns_is_pytorchs_bit_for_bit(channels, outputs, kernel, padding, stride, bias):
    generator = torch.Generator().manual_seed(channels + outputs)
    clip = torch.randn(1, channels, 5, 9, 13, generator=generator)
    weight = torch.randn(outputs, channels, *kernel, generator=generator)
    offset = torch.randn(outputs, generator=generator) if bias else None

    found = unfolded_conv3d(clip, weight, offset, stride=stride, padding=padding)

    assert torch.equal(found, F.conv3d(clip, weight, offset, stride=stride, padding=padding))


@pytest.mark.parametrize("frames, height, width", [(1, 8, 8), (3, 6, 8), (2, 5, 13)])
def test_a_vae_decodes_and_encodes_the_same_bits(frames, height, width):
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(16, 16, 32),
        down_block_types=["CogVideoXDownBlock3D"] * 3,
        up_block_types=["CogVideoXUpBlock3D"] * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    latents = torch.randn(1, 4, frames, height, width)
    clip = torch.rand(1, 3, 4 * frames - 3, 4 * height, 4 * width)
    with torch.inference_mode():
        decoded, encoded = vae.decode(latents).sample, vae.encode(clip).latent_dist.mean
        install(vae)
        assert torch.equal(vae.decode(latents).sample, decoded)
        assert torch.equal(vae.encode(clip).latent_dist.mean, encoded)


def test_columns_are_used_where_pytorch_would_make_them(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lib.pipelines.convolution.unfolded_conv3d",
        lambda *_, **__: calls.append(1) or unfolded_conv3d(*_, **__),
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(16, 16),
        down_block_types=["CogVideoXDownBlock3D"] * 2,
        up_block_types=["CogVideoXUpBlock3D"] * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    install(vae)
    with torch.inference_mode():
        vae.decode(torch.randn(1, 4, 2, 8, 8))
    assert calls
    calls.clear()
    with torch.inference_mode():
        vae.decode(torch.randn(2, 4, 2, 8, 8))  # for several clips at once PyTorch has a better way
    assert not calls
