"""How many processes make one clip, and how they share it: by guidance branch, by parts of the sequence.

The defaults: two processes take one branch of the guidance each; of four or more, half take each branch and
share its sequence (Ulysses); without guidance all of them share the one sequence.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError

VARIABLE = "COGVIDEOX_PARALLEL"
MOST_CPU_PROCESSES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """`branches` x `sequence` processes share a clip; `copies` groups of that size do the same work.

    Copies gain nothing; they are there where the model's heads allow no finer division.
    """

    branches: int = 1
    """2 where each half computes one branch of the guidance (CFG parallel), else 1."""
    sequence: int = 1
    """Processes that share one branch's sequence (the degree of Ulysses)."""
    copies: int = 1

    @property
    def processes(self) -> int:
        return self.branches * self.sequence * self.copies

    def __str__(self) -> str:
        parts = [f"cfg{self.branches}"] * (self.branches > 1) + [f"ulysses{self.sequence}"] * (
            self.sequence > 1
        )
        return "x".join(parts) or "one"


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """What setup decides: how many processes, and the layout with guidance if one was asked for."""

    processes: int
    heads: int
    forced: Layout | None = None

    def layout(self, *, guided: bool) -> Layout:
        """How a request is shared; `guided` when its guidance scale is above 1."""
        if guided and self.forced is not None:
            return self.forced
        return best_layout(self.processes, heads=self.heads, guided=guided)

    def facts(self, *, guided: bool) -> dict[str, object]:
        """For a request's metrics."""
        return {"processes": self.processes, "parallel": str(self.layout(guided=guided))}


def choose_team(asked: str, *, gpus: int, heads: int) -> Team:
    """The processes for a model with so many attention heads on a machine with so many GPUs (0: CPU).

    `asked` is COGVIDEOX_PARALLEL: empty for every GPU, `off`, a number of processes, or a layout such as
    cfg2, ulysses4 or cfg2xulysses2. On a CPU nothing is shared unless asked for. Raises UserError for what is
    none of these, and for what the machine or the model does not allow.
    """
    asked = asked.strip().lower()
    if asked in ("", "off", "0", "1"):
        wanted = 1 if asked in ("off", "0", "1") else max(1, gpus)
        return Team(processes=_largest_useful(wanted, heads=heads), heads=heads)
    forced = None if asked.isdigit() else _parse(asked)
    processes = forced.processes if forced else int(asked)
    _check_room(asked, processes, gpus)
    if forced is None:
        useful = _largest_useful(processes, heads=heads)
        if useful != processes:
            raise UserError(
                f"{VARIABLE}={asked}: {processes} processes cannot share a model with {heads} attention "
                f"heads; the nearest number that can is {useful}."
            )
    elif not heads_divide(heads, forced.sequence):
        allowed = [n for n in range(1, forced.sequence) if heads_divide(heads, n)]
        raise UserError(
            f"{VARIABLE}={asked}: {forced.sequence} processes cannot share a sequence of {heads} attention "
            f"heads; the nearest number that can is {allowed[-1]}."
        )
    return Team(processes=processes, heads=heads, forced=forced)


def heads_of(folder: Path) -> int:
    """Attention heads of the transformer in a diffusers folder."""
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    return config["num_attention_heads"]


def best_layout(processes: int, *, heads: int, guided: bool) -> Layout:
    """The default: branches first, which speak once a step, then the sequence as finely as heads allow."""
    branches = 2 if guided and processes % 2 == 0 else 1
    each = processes // branches
    sequence = next(n for n in range(each, 0, -1) if each % n == 0 and heads_divide(heads, n))
    return Layout(branches=branches, sequence=sequence, copies=each // sequence)


def heads_divide(heads: int, processes: int) -> bool:
    """Whether heads can be dealt out: evenly, or with less padding than the last process has heads.

    The condition of diffusers' Ulysses Anything, whose last process is to keep at least one real head.
    """
    padding = -heads % processes
    return padding == 0 or padding < (heads + padding) // processes


def divides_evenly(processes: int, *, heads: int, text_tokens: int, video_tokens: int) -> bool:
    """Whether plain Ulysses will do: heads, text and video all divide. If not, it takes Ulysses Anything."""
    return not any(count % processes for count in (heads, text_tokens, video_tokens))


def _largest_useful(processes: int, *, heads: int) -> int:
    """The most processes, up to so many, of which none merely repeats another's work."""
    return next(n for n in range(processes, 0, -1) if best_layout(n, heads=heads, guided=True).copies == 1)


def _parse(asked: str) -> Layout:
    match = re.fullmatch(r"(?:cfg(?P<cfg>2))?(?:(?(cfg)x)ulysses(?P<ulysses>[2-9]|[1-9]\d))?", asked)
    if not match or not asked:
        raise UserError(
            f"{VARIABLE}={asked} is unknown; allowed are off, a number of processes, cfg2, ulysses2 and "
            "more, cfg2xulysses2 and more."
        )
    return Layout(branches=int(match["cfg"] or 1), sequence=int(match["ulysses"] or 1))


def _check_room(asked: str, processes: int, gpus: int) -> None:
    if gpus and processes > gpus:
        has = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UserError(f"{VARIABLE}={asked} needs {processes} GPUs; this machine has {has}.")
    if processes > MOST_CPU_PROCESSES and not gpus:
        raise UserError(f"{VARIABLE}={asked}: at most {MOST_CPU_PROCESSES} processes can share a CPU.")
