"""The vision tower, which turns frames into tokens of the language model.

Modules are named as in the released checkpoint (`model.vision.*`), so that its keys need no mapping.
"""

import torch
from torch import nn
from torch.nn import functional as F

from lib.caption.config import CaptionConfig, VisionConfig

PROJECTION_EPS = 1e-5


class VisionTower(nn.Module):
    """Maps pixel values [N, 3, S, S] to [N, tokens, hidden]: for each frame boi, its patches by row, eoi."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.patch_embedding = PatchEmbedding(vision)
        self.transformer = Transformer(vision)
        self.conv = nn.Conv2d(vision.hidden_size, vision.hidden_size, 2, 2)
        self.linear_proj = Projection(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        patches = self.transformer(self.patch_embedding(frames))[:, 1:]
        count, length, width = patches.shape
        side = int(length**0.5)
        patches = self.conv(patches.reshape(count, side, side, width).permute(0, 3, 1, 2))
        patches = self.linear_proj(patches.flatten(2).transpose(1, 2))
        return torch.cat([self.boi.expand(count, -1, -1), patches, self.eoi.expand(count, -1, -1)], dim=1)


class PatchEmbedding(nn.Module):
    """Patches of a frame by row after a class token, with learned positions."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(vision.in_channels, vision.hidden_size, vision.patch_size, vision.patch_size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, vision.hidden_size))
        self.position_embedding = nn.Embedding(vision.num_positions, vision.hidden_size)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        patches = self.proj(frames).flatten(2).transpose(1, 2)
        first = self.cls_embedding.expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight.unsqueeze(0)


class Transformer(nn.Module):
    """The layers, in a module of their own as in the checkpoint's keys."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(vision) for _ in range(vision.num_hidden_layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Layer(nn.Module):
    """A transformer layer with post-norm: the outputs of attention and MLP are normalized."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        width, eps = vision.hidden_size, vision.layer_norm_eps
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.attention = Attention(vision)
        self.mlp = MLP(vision)
        self.post_attention_layernorm = nn.LayerNorm(width, eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.input_layernorm(self.attention(hidden))
        return hidden + self.post_attention_layernorm(self.mlp(hidden))


class MLP(nn.Module):
    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision.hidden_size, vision.intermediate_size)
        self.fc2 = nn.Linear(vision.intermediate_size, vision.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class Attention(nn.Module):
    """Self-attention within a frame."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.heads = vision.num_heads
        self.query_key_value = nn.Linear(vision.hidden_size, 3 * vision.hidden_size)
        self.dense = nn.Linear(vision.hidden_size, vision.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        count, length, _ = hidden.shape
        split = self.query_key_value(hidden).reshape(count, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.dense(attended.transpose(1, 2).flatten(2))


class Projection(nn.Module):
    """A gated linear unit that projects to the hidden size of the language model."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.linear_proj = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.norm1 = nn.LayerNorm(width, PROJECTION_EPS)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.dense_h_to_4h = nn.Linear(width, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.norm1(self.linear_proj(hidden)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(hidden)) * self.dense_h_to_4h(hidden))
