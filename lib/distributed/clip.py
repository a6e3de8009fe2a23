"""A process of one clip that torchrun began: the first is the predictor, the others take part."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.distributed.layout import VARIABLE, Team, choose_team, heads_of
from lib.distributed.process import own_gpu
from lib.distributed.process_group import Group
from lib.distributed.shared_clip import Loading, Part, load, take_part
from lib.errors import UserError
from lib.progress import LogView
from lib.storage.disk import disk_error

if TYPE_CHECKING:
    import torch

    from lib.generation.generator import Embeddings
    from lib.generation.request import Request
    from lib.lora.source import Choice


@dataclass(kw_only=True, slots=True)
class Launched:
    """To the first process's predictor what a Crew is to a server's: the others of one run."""

    team: Team
    group: Group | None = None
    device: str
    told: bool = False

    def start(self) -> None:
        """They are there."""

    def assemble(self) -> None:
        """Wait until all have loaded."""
        self.group = _join(self.team, self.device)

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
        """As Crew.together."""
        part = Part.of(request, embeddings, loras, self.team)
        self.told = True
        self.group.tell(part)
        self.group.meet()
        with self.group.sharing(transformer, part.layout):
            yield lambda: self.group.check(stop)

    def dismiss(self) -> None:
        """Let the others end, where there will be no clip to take part in."""
        if self.group is not None and not self.told:
            self.group.tell(None)


class Metrics(dict):
    """What a predictor reports to."""

    def record_metric(self, name: str, value: object) -> None:
        self[name] = value


def take_rank(task: str, inputs: dict[str, Any], output: Path) -> int:
    """This process's part; the exit status. Raises UserError in the first process."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.setdefault("COGVIDEOX_LOCAL_SOURCES", "1")
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        local = int(os.environ.get("LOCAL_RANK", rank))
        os.environ |= own_gpu(local, processes=count, gpus=count)
    if rank == 0:
        return _lead(task, inputs, output, count=count)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told, and tells the others
    return _follow(task, count=count)


def _lead(task: str, inputs: dict[str, Any], output: Path, *, count: int) -> int:
    from lib.predictors.start import start_video

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    view, metrics, launched = LogView(), Metrics(), []

    def others(loading: Loading) -> Launched | None:
        team = _team(loading, count=count)
        if team.processes > 1:
            launched.append(Launched(team=team, device=loading.machine.device))
        return launched[0] if launched else None

    try:
        with redirect_stdout(_Lines(view)):
            predictor = start_video(task, crew_for=others)
            path = predictor(metrics, **inputs)
            move_to(path, output)
    except UserError:
        for each in launched:
            each.dismiss()
        raise
    finally:
        view.close()
    print(output)
    shown = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in metrics.items()}
    print(", ".join(f"{name} {value}" for name, value in sorted(shown.items())), file=sys.stderr)
    return 0


def _follow(task: str, *, count: int) -> int:
    from lib.predictors.model import resolve_model
    from lib.predictors.video import plan_loading

    loading = plan_loading(resolve_model(task))
    team = _team(loading, count=count)
    generator, loras = load(loading)
    group = _join(team, loading.machine.device)
    part: Part | None = group.tell()
    if part is not None:
        take_part(part, generator=generator, loras=loras, group=group)
    return 0


def _team(loading: Loading, *, count: int) -> Team:
    """In the layout that COGVIDEOX_PARALLEL may name. Raises UserError where the processes do not fit it."""
    asked = os.environ.get(VARIABLE, "")
    named = asked if "cfg" in asked or "ulysses" in asked else str(count)
    team = choose_team(named, gpus=count, heads=heads_of(loading.folder))
    if team.processes != count:
        raise UserError(f"{VARIABLE}={asked} takes {team.processes} processes, not {count}.")
    return team


def _join(team: Team, device: str) -> Group:
    rank = int(os.environ["RANK"])
    return Group.join(rank=rank, count=team.processes, device=device, meeting=None)


def move_to(path: Path, output: Path) -> None:
    """Give a finished file its place, whole or not at all. Raises UserError when the disk refuses."""
    partial = partial_of(output)
    try:
        shutil.copyfile(path, partial)
        os.replace(partial, output)
    except OSError as error:
        raise disk_error(error, output) from error
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f".{path.name}.partial")


class _Lines:
    """A standard output whose lines go to a LogView."""

    def __init__(self, view: LogView) -> None:
        self.view, self.rest = view, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.view.line(line)
        return len(text)

    def flush(self) -> None:
        """Lines are shown when they end."""


def _interrupt(_number: int, _frame: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
