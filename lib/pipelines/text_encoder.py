"""The encoder of T5 v1.1, which turns prompts into embeddings, and its tokens' numbers.

What transformers' T5EncoderModel computes, to the last bit, in plain PyTorch: that one takes seconds to
import, on the way to the first video. Parameters have the checkpoint's names.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FEED_FORWARD = "gated-gelu"
KEPT_EXACT = "DenseReluDense.wo.weight"
"""Overflows in float16, and stays in float32 there: https://github.com/huggingface/transformers/issues/20287"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """Sizes, by the names of T5's config.json; what that leaves out is as here."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @classmethod
    def read(cls, folder: Path) -> Self:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(**{field.name: document[field.name] for field in fields(cls) if field.name in document})

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class Encoded(NamedTuple):
    """What the encoder returns; a tuple for those who take its first member."""

    last_hidden_state: Tensor
    """[batch, tokens, width]"""


class TextEncoder(nn.Module):
    """Token numbers [batch, tokens] -> embeddings. Padding is attended to, as CogVideoX was trained."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.shared.weight.device

    def forward(self, input_ids: Tensor) -> Encoded:
        return Encoded(self.encoder(self.shared(input_ids)))


class _Stack(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(config, first=layer == 0) for layer in range(config.num_layers))
        self.final_layer_norm = _Norm(config)

    def forward(self, states: Tensor) -> Tensor:
        bias = None  # the first block's, by all
        for block in self.block:
            states, bias = block(states, bias)
        return self.final_layer_norm(states)


class _Block(nn.Module):
    def __init__(self, config: TextEncoderConfig, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(config, first=first), _FeedForwardLayer(config)])

    def forward(self, states: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        attention, feed_forward = self.layer
        states, bias = attention(states, bias)
        return _finite(feed_forward(_finite(states))), bias


class _AttentionLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig, *, first: bool) -> None:
        super().__init__()
        self.SelfAttention = _Attention(config, first=first)
        self.layer_norm = _Norm(config)

    def forward(self, states: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        change, bias = self.SelfAttention(self.layer_norm(states), bias)
        return states + change, bias


class _Attention(nn.Module):
    def __init__(self, config: TextEncoderConfig, *, first: bool) -> None:
        super().__init__()
        self.heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if first:
            self.buckets = config.relative_attention_num_buckets
            self.far = config.relative_attention_max_distance
            self.relative_attention_bias = nn.Embedding(self.buckets, config.num_heads)

    def forward(self, states: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key, value = (
            project(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        if bias is None:
            bias = self._bias(states.size(1), states.device)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2)), bias

    def _bias(self, tokens: int, device: torch.device) -> Tensor:
        """What is added to attention's scores, [1, heads, tokens, tokens], by how far tokens are apart."""
        positions = torch.arange(tokens, device=device)
        bucket = distance_buckets(positions[None] - positions[:, None], buckets=self.buckets, far=self.far)
        return self.relative_attention_bias(bucket).permute(2, 0, 1)[None].contiguous()


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.DenseReluDense = _FeedForward(config)
        self.layer_norm = _Norm(config)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.DenseReluDense(self.layer_norm(states))


class _FeedForward(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        states = _gelu(self.wi_0(states)) * self.wi_1(states)
        if self.wo.weight.dtype == torch.float32:  # see KEPT_EXACT
            states = states.float()
        return self.wo(states)


class _Norm(nn.Module):
    """Scales to a root mean square of 1, computed in float32; no mean is taken off."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, states: Tensor) -> Tensor:
        square = states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (states * torch.rsqrt(square + self.epsilon)).to(self.weight.dtype)


def _gelu(states: Tensor) -> Tensor:
    """By tanh, written out: PyTorch's own rounds otherwise."""
    inner = states + 0.044715 * torch.pow(states, 3.0)
    return 0.5 * states * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * inner))


def _finite(states: Tensor) -> Tensor:
    """In float16, infinities are brought back a little below the largest number."""
    if states.dtype != torch.float16:
        return states
    largest = torch.finfo(torch.float16).max
    limit = torch.where(torch.isinf(states).any(), largest - 1000, largest)
    return states.clamp(min=-limit, max=limit)


def distance_buckets(distance: Tensor, *, buckets: int, far: int) -> Tensor:
    """The bucket of each distance from a token to one it attends to, in tokens; the same shape.

    Half of the buckets are for tokens before, half for those after. Of each, half hold one distance, the
    others grow logarithmically up to `far`; the last takes all beyond. T5, section 2.1 (arXiv:1910.10683).
    """
    half = buckets // 2
    single = half // 2
    away = distance.abs()
    growing = single + (torch.log(away.float() / single) / math.log(far / single) * (half - single)).to(
        torch.long
    )
    growing = growing.clamp(max=half - 1)
    return (distance > 0).to(torch.long) * half + torch.where(away < single, away, growing)


def is_ours(folder: Path) -> bool:
    """Whether a checkpoint's `text_encoder` is one of T5 v1.1 in safetensors; transformers knows others."""
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        return False
    return TextEncoderConfig.read(folder).feed_forward_proj == FEED_FORWARD


class _Uninitialized(TorchFunctionMode):
    """Leaves parameters as they are made: their first values are not wanted, and on "meta" would take the
    compiler."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


def load_text_encoder(folder: Path, tensors: dict[str, Tensor]) -> TextEncoder:
    """The encoder of a folder that `is_ours`, with what `read_tensors` read; ready for inference.

    Raises RuntimeError where tensors are missing.
    """
    with torch.device("meta"), _Uninitialized():
        encoder = TextEncoder(TextEncoderConfig.read(folder))
    encoder.load_state_dict(tensors, assign=True)
    return encoder.eval().requires_grad_(False)


def read_tensors(folder: Path, *, dtype: torch.dtype, device: str | torch.device) -> dict[str, Tensor]:
    """The encoder's tensors by name, of one file or several, on `device`; a decoder's are left out."""
    index = folder / INDEX
    files = [SINGLE]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors = {}
    for name in files:
        with safe_open(folder / name, framework="pt", device=str(device)) as file:
            for key in file.keys():  # noqa: SIM118, it is no dict
                exact = dtype == torch.float16 and key.endswith(KEPT_EXACT)
                tensor = file.get_tensor(key).to(torch.float32 if exact else dtype)
                if key == "encoder.embed_tokens.weight":  # `shared` by another name
                    tensors.setdefault("shared.weight", tensor)
                elif key == "shared.weight" or key.startswith("encoder."):
                    tensors[key] = tensor
    return tensors
