"""One forward pass of the transformer, shared by several processes and put together again in each of them.

Branches: of the two clips of a guided step (without and with the prompt) a process computes one. Sequence:
text and video tokens are dealt out before the first block, attention exchanges heads for tokens through
diffusers' context parallelism, and the tokens are gathered after the last projection. The attention has no
mask, so that neither the order nor the owner of a token matters. Nothing of it outlives `shared`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lib.distributed.layout import Layout, divides_evenly

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import DeviceMesh

BATCHED = ("hidden_states", "encoder_hidden_states", "timestep")
"""Inputs of the transformer with a row for each branch."""


@contextmanager
def shared(transformer: "CogVideoXTransformer3DModel", layout: Layout, mesh: "DeviceMesh") -> Iterator[None]:
    """Inside the block every call of the transformer is a joint one: each process of `mesh` has to make it.

    `mesh` has the dimensions copies, cfg, ring (1) and ulysses. All processes pass the same inputs and get
    the same result, which differs from one process's by rounding.
    """
    with ExitStack() as undo:
        for hook in (
            _share_branches(transformer, mesh["cfg"]) if layout.branches > 1 else (),
            _share_sequence(transformer, mesh, layout) if layout.sequence > 1 else (),
        ):
            for handle in hook:
                undo.callback(handle.remove)
        if layout.sequence > 1:
            undo.enter_context(_kernel_that_shares(transformer))
            undo.callback(_set_parallel, transformer, None)
        yield


def _share_branches(transformer: nn.Module, mesh: "DeviceMesh") -> Iterator[Any]:
    group, branch = mesh.get_group(), mesh.get_local_rank()

    def take(_module: nn.Module, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, inputs | {name: inputs[name].chunk(mesh.size())[branch] for name in BATCHED}

    def join(_module: nn.Module, _args: tuple, output: tuple[Tensor]) -> tuple[Tensor]:
        mine = output[0].contiguous()
        rows = [torch.empty_like(mine) for _ in range(mesh.size())]
        dist.all_gather(rows, mine, group=group)
        return (torch.cat(rows),)

    yield transformer.register_forward_pre_hook(take, with_kwargs=True)
    yield transformer.register_forward_hook(join)


def _share_sequence(transformer: nn.Module, mesh: "DeviceMesh", layout: Layout) -> Iterator[Any]:
    ulysses = mesh["ulysses"]
    parts, mine = ulysses.size(), ulysses.get_local_rank()
    tokens = 0
    even: bool | None = None
    """How attention is set up at the moment."""

    def cut(states: Tensor, dim: int) -> Tensor:
        return states.tensor_split(parts, dim=dim)[mine]

    def cut_rotary(_module: nn.Module, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        rotary = inputs.get("image_rotary_emb")
        if rotary is not None:
            inputs |= {"image_rotary_emb": tuple(cut(table, 0) for table in rotary)}
        return args, inputs

    def cut_tokens(_module: nn.Module, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        nonlocal tokens, even
        video, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
        tokens = video.size(1)
        heads = transformer.config.num_attention_heads
        divides = divides_evenly(parts, heads=heads, text_tokens=text.size(1), video_tokens=tokens)
        if divides is not even:
            even = divides
            _set_parallel(transformer, _parallel_config(mesh, parts, anything=not even))
        return args, inputs | {"hidden_states": cut(video, 1), "encoder_hidden_states": cut(text, 1)}

    def gather(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return _gather(output, tokens, ulysses)

    yield transformer.register_forward_pre_hook(cut_rotary, with_kwargs=True)
    yield transformer.transformer_blocks[0].register_forward_pre_hook(cut_tokens, with_kwargs=True)
    yield transformer.proj_out.register_forward_hook(gather)


def _gather(part: Tensor, tokens: int, mesh: "DeviceMesh") -> Tensor:
    """All parts of [B, tokens, width] as tensor_split dealt them. gloo gathers equal ones only: pad, cut."""
    parts = mesh.size()
    longest = -(-tokens // parts)
    padded = nn.functional.pad(part, (0, 0, 0, longest - part.size(1))).contiguous()
    gathered = [torch.empty_like(padded) for _ in range(parts)]
    dist.all_gather(gathered, padded, group=mesh.get_group())
    lengths = [tokens // parts + (rank < tokens % parts) for rank in range(parts)]
    return torch.cat([each[:, :length] for each, length in zip(gathered, lengths, strict=True)], dim=1)


def _parallel_config(mesh: "DeviceMesh", degree: int, *, anything: bool) -> "ParallelConfig":
    """What diffusers' dispatcher wants to know. `enable_parallelism` would set it too, but not on a CPU."""
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    context = ContextParallelConfig(
        ulysses_degree=degree, ulysses_anything=anything, mesh=mesh["ring", "ulysses"]
    )
    context._ring_mesh, context._ulysses_mesh = mesh["ring"], mesh["ulysses"]
    context._ring_local_rank, context._ulysses_local_rank = 0, mesh["ulysses"].get_local_rank()
    return ParallelConfig(context_parallel_config=context)


@contextmanager
def _kernel_that_shares(transformer: nn.Module) -> Iterator[None]:
    """Another attention kernel where the chosen one cannot share a sequence, as FlashAttention 3's cannot."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    processors = list(transformer.attn_processors.values())
    chosen = [processor._attention_backend for processor in processors]
    instead = AttentionBackendName._NATIVE_CUDNN if torch.cuda.is_available() else AttentionBackendName.NATIVE
    for processor, backend in zip(processors, chosen, strict=True):
        if backend is not None and not _AttentionBackendRegistry._is_context_parallel_available(backend):
            processor._attention_backend = instead
    try:
        yield
    finally:
        for processor, backend in zip(processors, chosen, strict=True):
            processor._attention_backend = backend


def _set_parallel(transformer: nn.Module, config: "ParallelConfig | None") -> None:
    for processor in transformer.attn_processors.values():
        processor._parallel_config = config
