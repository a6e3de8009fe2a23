"""A server's processes on its further GPUs: started in setup, told of each clip, started again when lost."""

import atexit
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cancellation import Stopped, check_stop
from lib.distributed.layout import VARIABLE, Team, choose_team, heads_of
from lib.distributed.process import Ended, Process, own_gpu
from lib.distributed.process_group import Group
from lib.distributed.shared_clip import Failed, Joining, Loading, Part, Ready
from lib.errors import UserError

if TYPE_CHECKING:
    import torch

    from lib.generation.generator import Embeddings
    from lib.generation.request import Request
    from lib.lora.source import Choice

MODULE = "lib.distributed.worker"
POLL_SECONDS = 0.05
NOTICE_SECONDS = 2.0
"""After an exchange failed: how long until the one whose end it was must have been heard of."""
SETTLE_SECONDS = 0.3
"""The others fail through it, and may be heard first."""


class LostProcessError(RuntimeError):
    """One of the processes of a clip ended or failed; not the request's fault."""


@dataclass(kw_only=True, slots=True)
class Crew:
    """The processes 1, 2, ... of a team; process 0 is the server's own. For one thread at a time."""

    team: Team
    loading: Loading
    gpus: int
    _processes: list[Process] = field(default_factory=list)
    _ready: set[int] = field(default_factory=set)
    _losses: list[tuple[bool, str]] = field(default_factory=list)
    """Whether it was the process's own end, and what to say of it; in the order heard."""
    _times_started: int = 0
    _group: Group | None = None
    _meeting: tempfile.TemporaryDirectory | None = None

    def start(self) -> None:
        """Start the processes; they load while this one does."""
        atexit.register(self.close)
        self._start_all()

    def assemble(self, *, stop: threading.Event | None = None) -> None:
        """Wait until all have loaded and belong together; those that were lost are started again.

        Raises LostProcessError where one cannot be loaded, and Stopped.
        """
        if self._losses or any(process.has_ended for process in self._processes):
            self._start_again()
        while len(self._ready) < len(self._processes):
            if self._losses:
                text = self._loss()
                self._start_again()
                raise LostProcessError(f"{text} while it was loading the model. Send the request again.")
            check_stop(stop)
            time.sleep(POLL_SECONDS)
        if self._group is None:
            self._meeting = tempfile.TemporaryDirectory(prefix="cogvideox-meeting-")
            meeting = Path(self._meeting.name) / "store"
            for rank, process in enumerate(self._processes, start=1):
                process.tell(Joining(rank=rank, count=self.team.processes, meeting=meeting))
            device = self.loading.machine.device
            self._group = Group.join(rank=0, count=self.team.processes, device=device, meeting=meeting)

    @contextmanager
    def together(
        self,
        request: "Request",
        embeddings: "Embeddings",
        stop: threading.Event | None,
        *,
        transformer: "torch.nn.Module",
        loras: "Sequence[Choice]",
    ) -> "Iterator[Callable[[], None]]":
        """Inside the block all processes denoise this request; yields what checks `stop` for all of them.

        The block has to make the same calls as Generator.latents in the others. Raises LostProcessError.
        """
        part = Part.of(request, embeddings, loras, self.team)
        group = self._begin(part, stop)
        try:
            with group.sharing(transformer, part.layout):
                yield lambda: group.check(stop)
        except Stopped:
            raise  # in all of them
        except BaseException as error:
            failure = self._failure(error, "while it was making the clip")
            raise failure from (None if failure is error else error)

    def _begin(self, part: Part, stop: threading.Event | None) -> Group:
        """All have heard of a part; told again where one turns out to be gone since the last request."""
        try:
            return self._told(part, stop)
        except LostProcessError:
            return self._told(part, stop)

    def _told(self, part: Part, stop: threading.Event | None) -> Group:
        self.assemble(stop=stop)
        for process in self._processes:
            process.tell(part)
        try:
            self._group.meet()
        except Exception as error:
            failure = self._failure(error, "before the clip was begun")
            raise failure from (None if failure is error else error)
        return self._group

    def _failure(self, error: BaseException, when: str) -> BaseException:
        """What to raise for an exchange that failed; the processes, out of step now, are started again."""
        lost = self._await_loss()
        self._start_again()
        if lost is None or isinstance(error, UserError):
            return error  # all of them met with it
        return LostProcessError(f"{lost} {when}. It is started again; send the request again.")

    @classmethod
    def for_server(cls, loading: Loading) -> "Crew | None":
        """As COGVIDEOX_PARALLEL says; None where one process does it all. Raises UserError."""
        import torch

        gpus = torch.cuda.device_count() if loading.machine.device == "cuda" else 0
        heads = heads_of(loading.folder)
        team = choose_team(os.environ.get(VARIABLE, ""), gpus=gpus, heads=heads)
        return cls(team=team, loading=loading, gpus=gpus) if team.processes > 1 else None

    def close(self) -> None:
        """End the processes."""
        self._times_started += 1
        processes, self._processes = self._processes, []
        for process in processes:
            process.kill()
        if self._group is not None:
            self._group.abort()  # NCCL would wait for the others, who are gone
            self._group.leave()
            self._group = None
        if self._meeting is not None:
            self._meeting.cleanup()
            self._meeting = None

    def _start_all(self) -> None:
        self._times_started += 1
        self._ready, self._losses = set(), []
        self._processes = [
            Process(
                MODULE,
                hear=partial(self._hear, self._times_started, rank),
                environment=own_gpu(rank, processes=self.team.processes, gpus=self.gpus),
            )
            for rank in range(1, self.team.processes)
        ]
        for process in self._processes:
            process.tell(self.loading)

    def _start_again(self) -> None:
        self.close()
        self._start_all()

    def _hear(self, time_started: int, rank: int, message: Any) -> None:
        """In the thread of a process."""
        if time_started != self._times_started:  # one that was ended here
            return
        if isinstance(message, Ready):
            self._ready.add(rank)
            return
        name = f"Process {rank + 1} of {self.team.processes}"
        if isinstance(message, Failed):
            self._losses.append((False, f"{name} failed ({message.error})"))
        elif isinstance(message, Ended):
            self._losses.append((True, f"{name} {message.how}"))
        if self._group is not None:
            self._group.abort()

    def _await_loss(self) -> str | None:
        """What became of another process, if that is why an exchange with it failed."""
        until = time.monotonic() + NOTICE_SECONDS
        while not self._losses and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        if not self._losses:
            return None
        time.sleep(SETTLE_SECONDS)
        return self._loss()

    def _loss(self) -> str:
        """One that was killed says more than those that failed because of it."""
        killed = [text for own, text in self._losses if own and "killed" in text]
        return killed[0] if killed else self._losses[0][1]
