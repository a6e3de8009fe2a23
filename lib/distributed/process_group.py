"""This process's place among those that make a clip together: how they meet, agree and part."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cancellation import Stopped
from lib.distributed.layout import Layout

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

EXCHANGE_SECONDS = 300
"""How long a process waits for the others in the middle of a clip; the first step may have to compile."""
ABORT_ONLY = "2"
"""What NCCL does when another process is gone: end what waits for it, and not also this process."""


@dataclass(kw_only=True, slots=True)
class Group:
    """A process's membership, from `join` to `leave`."""

    rank: int
    count: int
    device: str
    """cuda or cpu."""
    _meshes: dict[Layout, "DeviceMesh"] = field(default_factory=dict)

    @classmethod
    def join(
        cls, *, rank: int, count: int, device: str, meeting: Path | None, seconds: float = EXCHANGE_SECONDS
    ) -> "Group":
        """Wait for the others. They meet at a file of this machine, or where torchrun's variables say."""
        import torch
        import torch.distributed as dist

        if device == "cuda":
            torch.cuda.set_device(0)  # the only one that a process sees, but for the server's own
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", ABORT_ONLY)
        store = None
        if meeting is not None:
            # All on this machine: gloo would else look up the host's name, which a container may lack.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
            store = dist.FileStore(str(meeting), count)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=seconds),
        )
        return cls(rank=rank, count=count, device=device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def sharing(self, transformer: "torch.nn.Module", layout: Layout) -> Iterator[None]:
        """Share the transformer's calls inside the block; see lib/distributed/context_parallel.py."""
        from lib.distributed.context_parallel import shared

        with shared(transformer, layout, self._mesh(layout)):
            yield

    def check(self, stop: threading.Event | None) -> None:
        """Raise Stopped in every process if the first's `stop` is set; each has to call this."""
        if self.from_first(stop is not None and stop.is_set()):
            raise Stopped

    def meet(self) -> None:
        """Wait for the others at a point that all come to."""
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1))

    def from_first(self, value: bool) -> bool:
        """The first process's value, in every process."""
        import torch
        import torch.distributed as dist

        told = torch.tensor([int(value)])
        dist.broadcast(told, src=0)
        return bool(told)

    def tell(self, message: Any = None) -> Any:
        """The first process's message, in every process. Only among processes of one run: it is pickled."""
        import torch
        import torch.distributed as dist

        box = [message]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def abort(self) -> None:
        """Make what waits for the others fail, from any thread; the group is of no use afterwards."""
        import torch.distributed as dist

        if self.device == "cuda":  # gloo notices by itself
            with suppress(AssertionError, ValueError):  # aborted already
                dist.distributed_c10d._abort_process_group()

    def leave(self) -> None:
        """To be called at the end, and before another group can be joined."""
        import torch.distributed as dist

        self._meshes.clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _mesh(self, layout: Layout) -> "DeviceMesh":
        """Made when a layout is first used, by all processes at the same point of the same request."""
        from torch.distributed.device_mesh import init_device_mesh

        if layout not in self._meshes:
            self._meshes[layout] = init_device_mesh(
                self.device,
                (layout.copies, layout.branches, 1, layout.sequence),
                mesh_dim_names=("copies", "cfg", "ring", "ulysses"),
            )
        return self._meshes[layout]
