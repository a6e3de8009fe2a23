"""The VAE's convolutions on a CPU: the same products as PyTorch's, fed faster.

For one clip of a small size PyTorch does not choose oneDNN. It copies every window of the input into a column
of a matrix, in one thread and by small steps, and multiplies. `install` copies the columns in one go and in
all threads; the product, and with it every bit of the result, stays PyTorch's.
"""

from types import MethodType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d


def install(vae: "AutoencoderKLCogVideoX") -> None:
    """Make a VAE on a CPU decode and encode faster, bit for bit as before. For inference."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d

    for module in vae.modules():
        if isinstance(module, CogVideoXSafeConv3d) and module.groups == 1 and set(module.dilation) == {1}:
            module.forward = MethodType(_forward, module)


def _forward(self: "CogVideoXSafeConv3d", input: Tensor) -> Tensor:
    if len(input) == 1 and _is_unfolded(self, input):
        return unfolded_conv3d(input, self.weight, self.bias, stride=self.stride, padding=self.padding)
    return type(self).forward(self, input)


def _is_unfolded(conv: "CogVideoXSafeConv3d", input: Tensor) -> bool:
    """Whether PyTorch would compute this convolution by columns and a product."""
    chosen = torch._C._select_conv_backend(
        input, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, False, (0, 0, 0), conv.groups
    )
    return chosen == torch._C._ConvBackend.Slow3d


def unfolded_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
) -> Tensor:
    """F.conv3d of one clip, [1, C, T, H, W] with a weight of [O, C, t, h, w], as columns and a product."""
    if any(padding):
        input = F.pad(input, [side for pad in reversed(padding) for side in (pad, pad)])
    kernel, size, steps = weight.shape[2:], input.shape[2:], input.stride()[1:]
    out = [(whole - part) // step + 1 for whole, part, step in zip(size, kernel, stride, strict=True)]
    window_steps = [axis * step for axis, step in zip(steps[1:], stride, strict=True)]
    windows = input.as_strided((input.shape[1], *kernel, *out), (*steps, *window_steps))
    columns = windows.reshape(weight[0].numel(), -1)
    rows = weight.reshape(len(weight), -1)
    product = rows @ columns if bias is None else torch.addmm(bias[:, None], rows, columns)
    return product.view(1, len(weight), *out)
