"""CogVideoX's attention through diffusers' dispatcher, and blocks that keep text and video in one sequence.

The attention processor that diffusers ships calls one kernel directly, so that choosing a backend or sharing
the sequence among GPUs silently does nothing. `install` gives a transformer the processor below: the same
arithmetic in the same order, through `dispatch_attention_fn`, and in float32 on a CPU equal bit for bit.

    install(pipeline.transformer)
    pipeline.transformer.set_attention_backend("native")   # now takes effect

A server's backend (COGVIDEOX_ATTENTION) is chosen and set in lib/pipelines/acceleration.py.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the video tokens' positions, [tokens, head size] each."""


class CogVideoXAttention:
    """Attention of one block over text and video tokens together.

    It takes any backend of diffusers' dispatcher and, once a parallel config is set, several devices.
    """

    def __init__(self) -> None:
        self._attention_backend: AttentionBackendName | None = None  # both names are diffusers'
        self._parallel_config: Any = None
        self.parallel_dispatch: Callable[..., Tensor] = dispatch_attention_fn
        """The dispatcher over several devices; in compiled blocks one that is left out of the compilation."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take and return video and text [B, tokens, width], as diffusers' own processor does."""
        text_tokens = encoder_hidden_states.size(1)
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, joint.size(1), joint.size(0))
            attention_mask = attention_mask.view(joint.size(0), attn.heads, -1, attention_mask.shape[-1])
        joint = self.attend(attn, joint, text_tokens, image_rotary_emb, attention_mask)
        return joint[:, text_tokens:], joint[:, :text_tokens]

    def attend(
        self,
        attn: Attention,
        joint: Tensor,
        text_tokens: int,
        rotary: Rotary | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend over a joint sequence [B, text + video tokens, width], text first; the same shape out."""
        projections = cast(list[nn.Module], [attn.to_q, attn.to_k, attn.to_v])
        query, key, value = (project(joint).unflatten(-1, (attn.heads, -1)) for project in projections)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if rotary is not None:
            cos, sin = (table.unsqueeze(1) for table in rotary)  # [tokens, 1, head size], for all heads
            query = _rotate_video(query, text_tokens, cos, sin)
            key = _rotate_video(key, text_tokens, cos, sin)
        dispatch = dispatch_attention_fn if self._parallel_config is None else self.parallel_dispatch
        out = dispatch(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        projection, dropout = cast(nn.ModuleList, attn.to_out)
        return dropout(projection(out.flatten(2)))


def _rotate_video(states: Tensor, text_tokens: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for the video tokens of [B, tokens, heads, head size]; text has none."""
    video = states[:, text_tokens:]
    real, imaginary = video.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    video.copy_(video.float() * cos + turned.float() * sin)  # in place: `states` is used only here
    return states


def install(transformer: CogVideoXTransformer3DModel) -> None:
    """Give a transformer this attention, and blocks that compute on text and video in one tensor.

    The result is the same; LoRAs, offloading and regional compilation find the modules they know. A foreign
    attention processor gets diffusers' own block; diffusers' caches that hook attention modules are not
    supported. For inference only: blocks change intermediate tensors in place, which a backward pass does not
    survive.
    """
    ours: Any = {name: CogVideoXAttention() for name in transformer.attn_processors}
    transformer.set_attn_processor(ours)
    for block in transformer.transformer_blocks:
        block.forward = MethodType(_block_forward, block)


def processors(transformer: CogVideoXTransformer3DModel) -> list[CogVideoXAttention]:
    """Return the processors of a transformer with this attention installed, block by block."""
    return cast(list[CogVideoXAttention], list(transformer.attn_processors.values()))


def _block_forward(
    self: CogVideoXBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """CogVideoXBlock.forward on one sequence: one layer norm, and no splitting and joining in between.

    It takes 5% less time (the embedded model on a CPU). Another attention processor gets diffusers' own.
    """
    processor: object = self.attn1.processor
    if not isinstance(processor, CogVideoXAttention):
        return type(self).forward(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs
        )
    text_tokens = encoder_hidden_states.size(1)
    joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate, text_gate = _modulate(self.norm1, joint, text_tokens, temb)
    change = processor.attend(self.attn1, normed, text_tokens, image_rotary_emb)
    joint += _gated(change, text_tokens, gate, text_gate)
    normed, gate, text_gate = _modulate(self.norm2, joint, text_tokens, temb)
    joint += _gated(self.ff(normed), text_tokens, gate, text_gate)
    return joint[:, text_tokens:], joint[:, :text_tokens]


def _modulate(
    norm: CogVideoXLayerNormZero, joint: Tensor, text_tokens: int, temb: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sequence, normed and modulated by the time embedding, and the gates of video and text."""
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
