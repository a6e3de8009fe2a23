"""The processes that `accelerate launch` began: this one's place among them, and what they tell each other.

They speak through the store of key and value that brought them together, not through the GPUs: waiting for
each other then has no limit of time, a stop is heard meanwhile, and nothing hangs when one of them is gone
(its launcher ends the others).
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


class FirstFailedError(Exception):
    """The first process failed at what the others need, and says why itself."""


def launched() -> bool:
    """Whether `accelerate launch`, or torchrun, began this process."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def start_accelerator(*, seconds: float, **options: Any) -> "Accelerator":
    """The accelerator of this process: its GPU if there is one, as many processes as were launched.

    `seconds` is how long an exchange between GPUs may take; `options` are Accelerator's. Raises UserError for
    a launch that went another way than asked, and for sharding set up with `accelerate config`.
    """
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and began one, as it does where it sees no "
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
            f"accelerate is set up for {accelerator.distributed_type.value}; several GPUs are used by data "
            "parallelism alone here (accelerate launch --multi_gpu)."
        )
    return accelerator


class Processes:
    """All processes of a run; `rank` is this one's number of `count`."""

    def __init__(self) -> None:
        """Join them. Raises UserError as start_accelerator does."""
        self.rank, self.count = 0, 1
        if launched():
            accelerator = start_accelerator(seconds=3600)
            self.rank, self.count = accelerator.process_index, accelerator.num_processes
        if self.count > 1:
            from torch.distributed import TCPStore

            self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, topic: str, make: Callable[[], Any], *, stop: threading.Event) -> Any:
        """What `make` returns, anything that JSON can hold, in every process; only the first calls it.

        Each topic once. Raises what `make` raises in the first process, in the others FirstFailedError; and
        Stopped.
        """
        if self.count == 1:
            return make()
        key = f"cogvideox/{topic}"
        if self.is_first:
            told: dict[str, Any] = {}
            try:
                told = {"made": make()}
                return told["made"]
            finally:
                self._store.set(key, json.dumps(told))
        self._wait_for([key], stop)
        told = json.loads(self._store.get(key))
        if "made" not in told:
            raise FirstFailedError
        return told["made"]

    def arrive(self, topic: str) -> None:
        """Let the others know that this process is at a point."""
        if self.count > 1:
            self._store.set(f"cogvideox/{topic}/{self.rank}", "here")

    def meet(self, topic: str, *, stop: threading.Event) -> None:
        """Arrive and wait until all processes have. Raises Stopped."""
        if self.count > 1:
            self.arrive(topic)
            self._wait_for([f"cogvideox/{topic}/{rank}" for rank in range(self.count)], stop)

    def share(self, items: list[Any]) -> list[Any]:
        """Those that this process is to do: every so many-th, so that all advance alike."""
        return items[self.rank :: self.count]

    def leave(self) -> None:
        """To be called at the end; torch complains of processes that just go."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    def _wait_for(self, keys: list[str], stop: threading.Event) -> None:
        while not self._store.check(keys):
            check_stop(stop)
            time.sleep(POLL_SECONDS)
