"""How many processes denoise one clip, and how they divide it: by guidance branch and along the sequence.

By default two processes compute one branch of classifier-free guidance each. Of four or more, half compute
each branch and share its sequence (Ulysses). Without guidance all of them share the one sequence.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError

VARIABLE = "COGVIDEOX_PARALLEL"
MAX_CPU_PROCESSES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a clip is divided among `branches` x `sequence` x `copies` processes."""

    branches: int = 1
    """2 where each half of the processes computes one branch of the guidance (CFG parallel), else 1."""
    sequence: int = 1
    """Processes that share the sequence of one branch (Ulysses degree)."""
    copies: int = 1
    """Groups that repeat the same work; above 1 only where the attention heads cannot be divided further."""

    @property
    def processes(self) -> int:
        return self.branches * self.sequence * self.copies

    def __str__(self) -> str:
        parts = [f"cfg{self.branches}"] if self.branches > 1 else []
        parts += [f"ulysses{self.sequence}"] if self.sequence > 1 else []
        return "x".join(parts) or "one"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPlan:
    """The number of processes, decided in setup, and how they divide each request."""

    processes: int
    heads: int
    forced: Layout | None = None
    """The layout that COGVIDEOX_PARALLEL names, for requests with guidance."""

    def layout(self, *, guided: bool) -> Layout:
        """Return the layout of a request; `guided` when its guidance scale is above 1."""
        if guided and self.forced is not None:
            return self.forced
        return best_layout(self.processes, heads=self.heads, guided=guided)

    def metrics(self, *, guided: bool) -> dict[str, object]:
        """Return the layout for a request's metrics."""
        return {"processes": self.processes, "parallel": str(self.layout(guided=guided))}


def plan_processes(setting: str, *, gpus: int, heads: int) -> ParallelPlan:
    """Plan the processes for a transformer with `heads` attention heads.

    Args:
        setting: COGVIDEOX_PARALLEL: empty for every GPU, `off`, a number of processes, or a layout such as
            cfg2, ulysses4 or cfg2xulysses2.
        gpus: GPUs of this machine, 0 on a CPU, where one process is used unless `setting` says otherwise.
        heads: attention heads of the transformer.

    Raises:
        UserError: the setting is not valid, or the machine or the model does not allow it.
    """
    if setting in ("", "off", "0", "1"):
        wanted = max(1, gpus) if setting == "" else 1
        return ParallelPlan(processes=_largest_useful(wanted, heads=heads), heads=heads)
    forced = None if setting.isdigit() else parse_layout(setting)
    processes = forced.processes if forced else int(setting)
    _check_machine(setting, processes, gpus)
    if forced is None:
        useful = _largest_useful(processes, heads=heads)
        if useful != processes:
            raise UserError(
                f"{VARIABLE}={setting}: {processes} processes cannot share a model with {heads} attention "
                f"heads; the nearest number that can is {useful}."
            )
    elif not heads_divide(heads, forced.sequence):
        allowed = [n for n in range(1, forced.sequence) if heads_divide(heads, n)]
        raise UserError(
            f"{VARIABLE}={setting}: {forced.sequence} processes cannot share a sequence of {heads} attention "
            f"heads; the nearest number that can is {allowed[-1]}."
        )
    return ParallelPlan(processes=processes, heads=heads, forced=forced)


def parse_layout(setting: str) -> Layout:
    """Parse a layout such as cfg2xulysses4. Raises UserError."""
    match = re.fullmatch(r"(?:cfg(?P<cfg>2))?(?:(?(cfg)x)ulysses(?P<ulysses>[2-9]|[1-9]\d))?", setting)
    if not match or not setting:
        raise UserError(
            f"{VARIABLE}={setting} is unknown; allowed are off, a number of processes, cfg2, ulysses2 and "
            "more, cfg2xulysses2 and more."
        )
    return Layout(branches=int(match["cfg"] or 1), sequence=int(match["ulysses"] or 1))


def attention_heads(folder: Path) -> int:
    """Read the number of attention heads of the transformer in a diffusers folder."""
    config = json.loads((folder / "transformer" / "config.json").read_bytes())
    return config["num_attention_heads"]


def best_layout(processes: int, *, heads: int, guided: bool) -> Layout:
    """Return the default layout: branches first, as they communicate once a step, then the sequence."""
    branches = 2 if guided and processes % 2 == 0 else 1
    each = processes // branches
    sequence = next(n for n in range(each, 0, -1) if each % n == 0 and heads_divide(heads, n))
    return Layout(branches=branches, sequence=sequence, copies=each // sequence)


def heads_divide(heads: int, processes: int) -> bool:
    """Return whether heads can be divided: evenly, or with less padding than the last process has heads.

    This is the condition of diffusers' Ulysses Anything, whose last process must keep at least one real head.
    """
    padding = -heads % processes
    return padding == 0 or padding < (heads + padding) // processes


def divides_evenly(processes: int, *, heads: int, text_tokens: int, video_tokens: int) -> bool:
    """Return whether plain Ulysses works: heads, text and video all divide. If not, use Ulysses Anything."""
    return not any(count % processes for count in (heads, text_tokens, video_tokens))


def _largest_useful(processes: int, *, heads: int) -> int:
    """Return the largest number, up to `processes`, where no process merely repeats another's work."""
    return next(n for n in range(processes, 0, -1) if best_layout(n, heads=heads, guided=True).copies == 1)


def _check_machine(setting: str, processes: int, gpus: int) -> None:
    if gpus and processes > gpus:
        available = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UserError(f"{VARIABLE}={setting} needs {processes} GPUs; this machine has {available}.")
    if processes > MAX_CPU_PROCESSES and not gpus:
        raise UserError(f"{VARIABLE}={setting}: at most {MAX_CPU_PROCESSES} processes can share a CPU.")
