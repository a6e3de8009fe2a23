"""CogVideoX's attention through diffusers' dispatcher, and blocks that keep text and video in one sequence.

The attention processor that diffusers ships calls one kernel directly, so that choosing a backend or sharing
the sequence among GPUs silently does nothing. `install` gives a transformer the processor below: the same
arithmetic in the same order, through `dispatch_attention_fn`, and in float32 on a CPU equal bit for bit.

    install(pipeline.transformer)
    pipeline.transformer.set_attention_backend("native")   # now heard
"""

from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.normalization import CogVideoXLayerNormZero
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the video tokens' positions, [tokens, head size] each."""


@dataclass(slots=True)
class FusedProjections:
    """Query, key and value weights one below the other; the three modules' own weights are views of them."""

    weight: Tensor
    """[3 * width, width]"""
    bias: Tensor | None

    def serves(self, attn: "Attention") -> bool:
        """Whether the modules still compute with these weights: no LoRA around them, nothing moved them."""
        return (
            type(attn.to_q) is type(attn.to_k) is type(attn.to_v) is nn.Linear
            and attn.to_q.weight.data_ptr() == self.weight.data_ptr()
        )


class CogVideoXAttention:
    """Attention of one block over text and video tokens together.

    With a backend of diffusers' dispatcher and, once `enable_parallelism` has set it, over several devices.
    """

    def __init__(self) -> None:
        self._attention_backend = None  # both names are what diffusers looks for
        self._parallel_config = None
        self.fused: FusedProjections | None = None
        self.dispatch_shared = dispatch_attention_fn
        """The same over several devices; replaced in compiled blocks, whose compiler cannot follow it."""

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers' own processor: [B, video tokens, width] and [B, text tokens, width], the same out."""
        text_tokens = encoder_hidden_states.size(1)
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, joint.size(1), joint.size(0))
            attention_mask = attention_mask.view(joint.size(0), attn.heads, -1, attention_mask.shape[-1])
        joint = self.attend(attn, joint, text_tokens, image_rotary_emb, attention_mask)
        return joint[:, text_tokens:], joint[:, :text_tokens]

    def attend(
        self,
        attn: "Attention",
        joint: Tensor,
        text_tokens: int,
        rotary: Rotary | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention over a joint sequence [B, text + video tokens, width], text first; the same shape out."""
        query, key, value = self._project(attn, joint)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if rotary is not None:
            cos, sin = (table.unsqueeze(1) for table in rotary)  # [tokens, 1, head size]: beside all heads
            query = _rotate_video(query, text_tokens, cos, sin)
            key = _rotate_video(key, text_tokens, cos, sin)
        dispatch = dispatch_attention_fn if self._parallel_config is None else self.dispatch_shared
        out = dispatch(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        projection, dropout = attn.to_out
        return dropout(projection(out.flatten(2)))

    def _project(self, attn: "Attention", joint: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, [B, tokens, heads, head size] each."""
        if self.fused is not None and self.fused.serves(attn):
            together = F.linear(joint, self.fused.weight, self.fused.bias)
            return together.unflatten(-1, (3, attn.heads, -1)).unbind(2)
        return tuple(
            project(joint).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )


def _rotate_video(states: Tensor, text_tokens: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for the video tokens of [B, tokens, heads, head size]; text has none."""
    video = states[:, text_tokens:]
    real, imaginary = video.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    video.copy_(video.float() * cos + turned.float() * sin)  # `states` is the caller's own to change
    return states


def install(transformer: "CogVideoXTransformer3DModel") -> None:
    """Give a transformer this attention, and blocks that compute on text and video in one tensor.

    The result is the same; LoRAs, caches, offloading and regional compilation see the modules they know. For
    inference: blocks change intermediate tensors in place, which would upset a backward pass.
    """
    transformer.set_attn_processor({name: CogVideoXAttention() for name in transformer.attn_processors})
    for block in transformer.transformer_blocks:
        block.forward = MethodType(_block_forward, block)


def fuse_projections(transformer: "CogVideoXTransformer3DModel") -> None:
    """One matrix product for query, key and value wherever they are plain linear layers.

    Takes no memory: the modules keep their names and become views of the fused weights. A layer that a LoRA
    wraps, or whose weights are moved, computes apart again until it is as it was.
    """
    for block in transformer.transformer_blocks:
        attn = block.attn1
        layers = (attn.to_q, attn.to_k, attn.to_v)
        if any(type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter for layer in layers):
            continue
        attn.processor.fused = FusedProjections(
            weight=_stack([layer.weight for layer in layers]),
            bias=None if attn.to_q.bias is None else _stack([layer.bias for layer in layers]),
        )


@torch.no_grad()
def _stack(parameters: list[nn.Parameter]) -> Tensor:
    """The parameters' values one below the other; the parameters become views of the result."""
    stacked = torch.cat([parameter.detach() for parameter in parameters])
    parts = stacked.split([parameter.size(0) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return stacked


def _block_forward(
    self: "CogVideoXBlock",
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary | None = None,
    attention_kwargs: dict | None = None,
) -> tuple[Tensor, Tensor]:
    """CogVideoXBlock.forward on one sequence: one layer norm and no joining and parting inside."""
    text_tokens = encoder_hidden_states.size(1)
    joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate, text_gate = _modulate(self.norm1, joint, text_tokens, temb)
    change = self.attn1.processor.attend(self.attn1, normed, text_tokens, image_rotary_emb)
    joint += _gated(change, text_tokens, gate, text_gate)
    normed, gate, text_gate = _modulate(self.norm2, joint, text_tokens, temb)
    joint += _gated(self.ff(normed), text_tokens, gate, text_gate)
    return joint[:, text_tokens:], joint[:, :text_tokens]


def _modulate(
    norm: "CogVideoXLayerNormZero", joint: Tensor, text_tokens: int, temb: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed sequence, shifted and scaled by the time embedding, and the gates of video and text."""
    modulation = norm.linear(norm.silu(temb)).unsqueeze(1).chunk(6, dim=-1)
    shift, scale, gate, text_shift, text_scale, text_gate = modulation
    normed = norm.norm(joint)
    normed[:, :text_tokens].mul_(1 + text_scale).add_(text_shift)
    normed[:, text_tokens:].mul_(1 + scale).add_(shift)
    return normed, gate, text_gate


def _gated(change: Tensor, text_tokens: int, gate: Tensor, text_gate: Tensor) -> Tensor:
    change[:, :text_tokens].mul_(text_gate)
    change[:, text_tokens:].mul_(gate)
    return change
