"""Workers on this machine's further GPUs: started in setup, sent each clip, restarted when one is lost."""

import atexit
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from lib import settings
from lib.cancellation import Stopped, check_stop
from lib.distributed.child_process import ChildProcess, Exited, gpu_environment
from lib.distributed.layout import ParallelPlan, attention_heads, plan_processes
from lib.distributed.messages import (
    DenoisingJob,
    Embeddings,
    JoinGroup,
    ModelLoaded,
    ModelSetup,
    WorkerFailed,
)
from lib.distributed.process_group import ProcessGroup
from lib.errors import UserError
from lib.generation.request import Request
from lib.lora.source import Choice

MODULE = "lib.distributed.worker"
POLL_SECONDS = 0.05
NOTICE_SECONDS = 2.0
"""How long after a failed exchange the exit of the worker that caused it may take to be reported."""
GATHER_SECONDS = 0.3
"""How long to wait after the first report: workers that fail because of another may report first."""


class LostProcessError(RuntimeError):
    """A process of a clip exited or failed, which is not the request's fault."""

    def __init__(self, loss: str, *, advice: str) -> None:
        super().__init__(f"{loss} {advice}")
        self.loss = loss
        """What happened, without the advice for someone who uses a server."""


@dataclass(kw_only=True, slots=True)
class WorkerPool:
    """Processes 1, 2, ... of a plan; process 0 is this one. Not for several threads at once."""

    plan: ParallelPlan
    setup: ModelSetup
    gpus: int
    _workers: list[ChildProcess] = field(default_factory=list)
    _loaded: set[int] = field(default_factory=set)
    """Ranks of the workers that have loaded the model."""
    _losses: list[tuple[bool, str]] = field(default_factory=list)
    """Whether a process exited (or else reported a failure), and a description; in the order of arrival."""
    _starts: int = 0
    _group: ProcessGroup | None = None
    _store: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start the workers; they load the model while this process does."""
        atexit.register(self.close)
        self._start_workers()

    def wait_until_ready(self, *, stop: threading.Event | None = None) -> ProcessGroup:
        """Wait until all workers have loaded the model and joined the group; lost ones are restarted.

        Raises LostProcessError when one cannot load the model, and Stopped.
        """
        if self._losses or any(worker.has_exited for worker in self._workers):
            self._restart()
        while len(self._loaded) < len(self._workers):
            if self._losses:
                loss = f"{self._main_loss()} while it was loading the model."
                self._restart()
                raise LostProcessError(loss, advice="Send the request again.")
            check_stop(stop)
            time.sleep(POLL_SECONDS)
        if self._group is None:
            self._store = tempfile.TemporaryDirectory(prefix="cogvideox-group-")
            store = Path(self._store.name) / "store"
            count = self.plan.processes
            for rank, worker in enumerate(self._workers, start=1):
                worker.send(JoinGroup(rank=rank, count=count, store=store))
            device = self.setup.machine.device
            self._group = ProcessGroup.join(rank=0, count=count, device=device, store=store)
        return self._group

    @contextmanager
    def shared_denoising(
        self,
        request: Request,
        embeddings: Embeddings,
        stop: threading.Event | None,
        *,
        loras: list[Choice],
        transformer: CogVideoXTransformer3DModel,
    ) -> Iterator[Callable[[], None]]:
        """Denoise a request in all processes; yields the function that checks `stop` for all of them.

        The block must call the transformer and the check exactly as Generator.latents does in the workers.
        Raises LostProcessError.
        """
        prompt, negative = embeddings
        job = DenoisingJob(
            request=request,
            loras=loras,
            embeddings=(prompt.detach().cpu(), None if negative is None else negative.detach().cpu()),
            layout=self.plan.layout(guided=request.guided),
        )
        group = self._send_job(job, stop)
        try:
            with group.shared_forward(transformer, job.layout):
                yield lambda: group.check_stop(stop)
        except Stopped:
            raise  # in all of them
        except BaseException as error:
            failure = self._failure(error, "while it was making the clip.")
            raise failure from (None if failure is error else error)

    def close(self) -> None:
        """Kill the workers and leave the group."""
        self._starts += 1
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
        if self._group is not None:
            self._group.abort()  # NCCL would wait for the other processes, which are gone
            self._group.close()
            self._group = None
        if self._store is not None:
            self._store.cleanup()
            self._store = None

    def _send_job(self, job: DenoisingJob, stop: threading.Event | None) -> ProcessGroup:
        """Give the job to all; once more when one turns out to have been lost since the last request."""
        try:
            return self._try_to_send_job(job, stop)
        except LostProcessError:
            return self._try_to_send_job(job, stop)

    def _try_to_send_job(self, job: DenoisingJob, stop: threading.Event | None) -> ProcessGroup:
        group = self.wait_until_ready(stop=stop)
        for worker in self._workers:
            worker.send(job)
        try:
            group.barrier()
        except Exception as error:
            failure = self._failure(error, "before the clip was started.")
            raise failure from (None if failure is error else error)
        return group

    def _failure(self, error: BaseException, when: str) -> BaseException:
        """Return what to raise for a failed exchange. The workers, out of step now, are restarted."""
        loss = self._wait_for_loss()
        self._restart()
        if loss is None or isinstance(error, UserError):
            return error  # it was raised in all of them
        return LostProcessError(f"{loss} {when}", advice="It is being restarted; send the request again.")

    def _start_workers(self) -> None:
        self._starts += 1
        self._loaded, self._losses = set(), []
        self._workers = [
            ChildProcess(
                MODULE,
                on_message=partial(self._on_message, self._starts, rank),
                environment=gpu_environment(rank, processes=self.plan.processes, gpus=self.gpus),
            )
            for rank in range(1, self.plan.processes)
        ]
        for worker in self._workers:
            worker.send(self.setup)

    def _restart(self) -> None:
        self.close()
        self._start_workers()

    def _on_message(self, start: int, rank: int, message: Any) -> None:
        """Handle a worker's message, in the thread that reads its connection."""
        if start != self._starts:  # from a worker that was killed here
            return
        if isinstance(message, ModelLoaded):
            self._loaded.add(rank)
            return
        name = f"Process {rank + 1} of {self.plan.processes}"
        if isinstance(message, WorkerFailed):
            self._losses.append((False, f"{name} failed ({message.error})"))
        elif isinstance(message, Exited):
            self._losses.append((True, f"{name} {message.how}"))
        group = self._group  # the thread of requests may leave it at any time
        if group is not None:
            group.abort()

    def _wait_for_loss(self) -> str | None:
        """Return what happened to another process, if that is why an exchange with it failed."""
        deadline = time.monotonic() + NOTICE_SECONDS
        while not self._losses and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if not self._losses:
            return None
        time.sleep(GATHER_SECONDS)
        return self._main_loss()

    def _main_loss(self) -> str:
        """Return the loss that explains the others: a kill rather than a failure that followed from it."""
        killed = [text for exited, text in self._losses if exited and "killed" in text]
        return killed[0] if killed else self._losses[0][1]


def create_pool(setup: ModelSetup) -> WorkerPool | None:
    """Create the pool that COGVIDEOX_PARALLEL asks for; None if one process is enough. Raises UserError."""
    gpus = torch.cuda.device_count() if setup.machine.device == "cuda" else 0
    heads = attention_heads(setup.folder)
    plan = plan_processes(settings.current().parallel, gpus=gpus, heads=heads)
    return WorkerPool(plan=plan, setup=setup, gpus=gpus) if plan.processes > 1 else None
