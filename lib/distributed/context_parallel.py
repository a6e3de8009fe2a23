"""One forward pass of the transformer shared by several processes, with the complete result in each of them.

Branches: of the two clips of a guided step (without and with the prompt) a process computes one. Sequence:
text and video tokens are divided before the first block, attention exchanges heads for tokens through
diffusers' context parallelism, and the tokens are gathered after the last projection. The attention has no
mask, so neither the order nor the owner of a token matters. `parallelize` undoes everything at its end.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from diffusers import CogVideoXTransformer3DModel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from lib.distributed.layout import Layout, divides_evenly

BATCHED = ("hidden_states", "encoder_hidden_states", "timestep")
"""Inputs of the transformer with a row for each branch."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module."""


@contextmanager
def parallelize(transformer: CogVideoXTransformer3DModel, layout: Layout, mesh: DeviceMesh) -> Iterator[None]:
    """Share every call of the transformer inside the block: each process of `mesh` has to make it.

    `mesh` has the dimensions copies, cfg, ring (1) and ulysses. All processes pass the same inputs and get
    the same result, which differs from that of one process by rounding.
    """
    with ExitStack() as undo:
        handles: list[RemovableHandle] = []
        if layout.branches > 1:
            handles += _share_branches(transformer, mesh["cfg"])
        if layout.sequence > 1:
            handles += _share_sequence(transformer, mesh)
            undo.enter_context(_backend_that_shares(transformer))
            undo.callback(_set_parallel, transformer, None)
        for handle in handles:
            undo.callback(handle.remove)
        yield


def _share_branches(transformer: nn.Module, mesh: DeviceMesh) -> list[RemovableHandle]:
    group, branch = mesh.get_group(), mesh.get_local_rank()

    def take(_module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Inputs:
        return args, inputs | {name: inputs[name].chunk(mesh.size())[branch] for name in BATCHED}

    def join(_module: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor]) -> tuple[Tensor]:
        own = output[0].contiguous()
        rows = [torch.empty_like(own) for _ in range(mesh.size())]
        dist.all_gather(rows, own, group=group)
        return (torch.cat(rows),)

    return [
        transformer.register_forward_pre_hook(take, with_kwargs=True),
        transformer.register_forward_hook(join),
    ]


def _share_sequence(transformer: CogVideoXTransformer3DModel, mesh: DeviceMesh) -> list[RemovableHandle]:
    ulysses = mesh["ulysses"]
    parts, rank = ulysses.size(), ulysses.get_local_rank()
    tokens = 0
    even: bool | None = None
    """How attention is set up at the moment."""

    def cut(states: Tensor, dim: int) -> Tensor:
        return states.tensor_split(parts, dim=dim)[rank]

    def cut_rotary(_module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Inputs:
        rotary = inputs.get("image_rotary_emb")
        if rotary is not None:
            inputs |= {"image_rotary_emb": tuple(cut(table, 0) for table in rotary)}
        return args, inputs

    def cut_tokens(_module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Inputs:
        nonlocal tokens, even
        video, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        tokens = video.size(1)
        heads = transformer.config["num_attention_heads"]
        divides = divides_evenly(parts, heads=heads, text_tokens=text.size(1), video_tokens=tokens)
        if divides is not even:
            even = divides
            _set_parallel(transformer, _parallel_config(mesh, parts, anything=not even))
        return args, inputs | {"hidden_states": cut(video, 1), "encoder_hidden_states": cut(text, 1)}

    def gather(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _gather(output, tokens, ulysses)

    return [
        transformer.register_forward_pre_hook(cut_rotary, with_kwargs=True),
        transformer.transformer_blocks[0].register_forward_pre_hook(cut_tokens, with_kwargs=True),
        transformer.proj_out.register_forward_hook(gather),
    ]


def _gather(part: Tensor, tokens: int, mesh: DeviceMesh) -> Tensor:
    """Join all parts of [B, tokens, width] as tensor_split made them.

    gloo gathers parts of equal length only: pad them first, cut them afterwards.
    """
    parts = mesh.size()
    longest = -(-tokens // parts)
    padded = nn.functional.pad(part, (0, 0, 0, longest - part.size(1))).contiguous()
    gathered = [torch.empty_like(padded) for _ in range(parts)]
    dist.all_gather(gathered, padded, group=mesh.get_group())
    lengths = [tokens // parts + (rank < tokens % parts) for rank in range(parts)]
    return torch.cat([each[:, :length] for each, length in zip(gathered, lengths, strict=True)], dim=1)


def _parallel_config(mesh: DeviceMesh, degree: int, *, anything: bool) -> ParallelConfig:
    """Build what diffusers' attention dispatcher reads.

    `enable_parallelism` would set it too, but fails on a CPU: it divides by the number of accelerators.
    """
    context = ContextParallelConfig(
        ulysses_degree=degree, ulysses_anything=anything, mesh=mesh["ring", "ulysses"]
    )
    context._ring_mesh, context._ulysses_mesh = mesh["ring"], mesh["ulysses"]
    context._ring_local_rank, context._ulysses_local_rank = 0, mesh["ulysses"].get_local_rank()
    return ParallelConfig(context_parallel_config=context)


@contextmanager
def _backend_that_shares(transformer: CogVideoXTransformer3DModel) -> Iterator[None]:
    """Replace an attention backend that cannot share a sequence, as FlashAttention 3's, inside the block."""
    processors = _processors(transformer)
    chosen = [processor._attention_backend for processor in processors]
    substitute = (
        AttentionBackendName._NATIVE_CUDNN if torch.cuda.is_available() else AttentionBackendName.NATIVE
    )
    for processor, backend in zip(processors, chosen, strict=True):
        if backend is not None and not _AttentionBackendRegistry._is_context_parallel_available(backend):
            processor._attention_backend = substitute
    try:
        yield
    finally:
        for processor, backend in zip(processors, chosen, strict=True):
            processor._attention_backend = backend


def _set_parallel(transformer: CogVideoXTransformer3DModel, config: ParallelConfig | None) -> None:
    for processor in _processors(transformer):
        processor._parallel_config = config


def _processors(transformer: CogVideoXTransformer3DModel) -> list[Any]:
    """Return the attention processors, which lib/pipelines/attention.py has installed."""
    return list(transformer.attn_processors.values())
