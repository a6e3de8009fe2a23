"""The processes that `accelerate launch` started: this one's rank, and how they coordinate.

They communicate through torch's key-value store, not through the GPUs: waiting for each other then has no
time limit, a stop is noticed meanwhile, and nothing hangs when one is gone (its launcher ends the others).
torch and accelerate are imported when processes are joined: script/caption checks its arguments before that.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lib.cancellation import check_stop
from lib.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

POLL_SECONDS = 0.1


class FirstProcessError(Exception):
    """The first process failed to make what the others need, and reports the reason itself."""


def is_launched() -> bool:
    """Return whether `accelerate launch`, or torchrun, started this process."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def start_accelerator(*, seconds: float, **options: Any) -> "Accelerator":
    """Create the accelerator of this process, on its GPU if there is one.

    Args:
        seconds: how long an exchange between GPUs may take.
        options: further arguments of Accelerator.

    Raises:
        UserError: fewer processes were started than asked for, or `accelerate config` has set up sharding.
    """
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does where it sees no "
            "GPUs; add --multi_gpu, which works on CPUs too."
        )
    import torch
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()  # of an earlier run in this process, whose precision may differ
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))],
        **options,
    )
    kinds = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in kinds:
        raise UserError(
            f"accelerate is set up for {accelerator.distributed_type.value}; only data parallelism is "
            "supported here (accelerate launch --multi_gpu)."
        )
    return accelerator


class AccelerateProcesses:
    """All processes of a run; `rank` is this one's number of `count`."""

    def __init__(self) -> None:
        """Join them. Raises UserError as start_accelerator does."""
        self.rank, self.count = 0, 1
        if is_launched():
            accelerator = start_accelerator(seconds=3600)
            self.rank, self.count = accelerator.process_index, accelerator.num_processes
        if self.count > 1:
            from torch.distributed import TCPStore

            self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast_from_first(self, topic: str, make: Callable[[], Any], *, stop: threading.Event) -> Any:
        """Call `make` in the first process only and return its result in all of them.

        The result must be valid in JSON, and a topic can be used once. Raises what `make` raises in the first
        process, FirstProcessError in the others, and Stopped.
        """
        if self.count == 1:
            return make()
        key = f"cogvideox/{topic}"
        if self.is_first:
            message: dict[str, Any] = {}
            try:
                message = {"made": make()}
                return message["made"]
            finally:
                self._store.set(key, json.dumps(message))
        self._wait_for([key], stop)
        message = json.loads(self._store.get(key))
        if "made" not in message:
            raise FirstProcessError
        return message["made"]

    def arrive(self, topic: str) -> None:
        """Announce that this process has reached a barrier, without waiting for them."""
        if self.count > 1:
            self._store.set(f"cogvideox/{topic}/{self.rank}", "here")

    def barrier(self, topic: str, *, stop: threading.Event) -> None:
        """Wait until all processes have arrived. Raises Stopped."""
        if self.count > 1:
            self.arrive(topic)
            self._wait_for([f"cogvideox/{topic}/{rank}" for rank in range(self.count)], stop)

    def share(self, items: list[Any]) -> list[Any]:
        """Return this process's share: every count-th item, so that all processes advance alike."""
        return items[self.rank :: self.count]

    def close(self) -> None:
        """Destroy the process group at the end; torch complains about processes that just exit."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    def _wait_for(self, keys: list[str], stop: threading.Event) -> None:
        while not self._store.check(keys):
            check_stop(stop)
            time.sleep(POLL_SECONDS)
