"""The language model: transformers' Llama, with the original's RMS norm and rotary embedding.

Both round differently in bfloat16 (logits of a small model change by up to 0.23), so captions would differ.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lib.caption.config import ROPE_BASE, CaptionConfig


def build_language_model(config: CaptionConfig) -> LlamaForCausalLM:
    """Build a Llama of the configured size with random weights."""
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_multi_query_heads,
        hidden_act=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=list(config.eos_token_ids),
        pad_token_id=None,  # a padding index would keep that row of the embedding at zero
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]  (a parameter of the base class)
    )
    model = LlamaForCausalLM(llama)
    model.model.register_module("norm", RMSNorm(config))
    for layer in model.model.layers:
        layer.register_module("input_layernorm", RMSNorm(config))
        layer.register_module("post_attention_layernorm", RMSNorm(config))
    model.model.register_module("rotary_emb", RotaryEmbedding(config))
    return model


class RMSNorm(nn.Module):
    """Root mean square norm that rounds to the model's dtype once, after multiplying by the weight."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        exact = hidden.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * exact).to(hidden.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary embedding with the checkpoint's frequencies, whose dtype is also that of the angles.

    In bfloat16 that rounds positions above 256; the model was trained so.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__()
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("inv_freq", ROPE_BASE**-steps)

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine, [B, L, head_dim], in the dtype of `hidden`."""
        angles = position_ids[..., None].to(self.inv_freq.dtype) * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
