"""The torch process group of the processes that denoise a clip together."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import CogVideoXTransformer3DModel
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lib.cancellation import Stopped
from lib.distributed.context_parallel import parallelize
from lib.distributed.layout import Layout

EXCHANGE_SECONDS = 300
"""How long a process waits for the others in the middle of a clip; the first step may have to compile."""
ABORT_ONLY = "2"
"""NCCL's mode when another process is gone: abort what waits for it, but do not end this process."""


@dataclass(kw_only=True, slots=True)
class ProcessGroup:
    """This process's membership, from `join` to `close`."""

    rank: int
    count: int
    device: str
    """cuda or cpu."""
    _meshes: dict[Layout, DeviceMesh] = field(default_factory=dict)

    @classmethod
    def join(
        cls, *, rank: int, count: int, device: str, store: Path, seconds: float = EXCHANGE_SECONDS
    ) -> "ProcessGroup":
        """Wait until all `count` processes of this machine have joined through the file `store`."""
        if device == "cuda":
            torch.cuda.set_device(0)  # a worker sees only its own GPU
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", ABORT_ONLY)
        # gloo would otherwise look up the host's name, which a container may not have.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=dist.FileStore(str(store), count),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=seconds),
        )
        return cls(rank=rank, count=count, device=device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def shared_forward(self, transformer: CogVideoXTransformer3DModel, layout: Layout) -> Iterator[None]:
        """Share the transformer's forward passes inside the block; all processes must make the same ones."""
        with parallelize(transformer, layout, self._mesh(layout)):
            yield

    def check_stop(self, stop: threading.Event | None) -> None:
        """Raise Stopped in every process if the first one's `stop` is set; every process must call this."""
        stopped = torch.tensor([int(stop is not None and stop.is_set())])
        dist.broadcast(stopped, src=0)
        if stopped:
            raise Stopped

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        dist.all_reduce(torch.zeros(1))

    def abort(self) -> None:
        """Make calls that wait for other processes fail, from any thread. The group cannot be used again."""
        if self.device == "cuda":  # gloo notices by itself
            with suppress(AssertionError, ValueError):  # aborted already
                dist.distributed_c10d._abort_process_group()

    def close(self) -> None:
        """Leave the group; needed before another one can be joined."""
        self._meshes.clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _mesh(self, layout: Layout) -> DeviceMesh:
        """Return the device mesh of a layout, created by all processes at the same point of a request."""
        if layout not in self._meshes:
            self._meshes[layout] = init_device_mesh(
                self.device,
                (layout.copies, layout.branches, 1, layout.sequence),
                mesh_dim_names=("copies", "cfg", "ring", "ulysses"),
            )
        return self._meshes[layout]
