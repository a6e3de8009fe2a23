"""What is kept of the losses: the curve on disk, and the moment at which training has gone wrong."""

import math
import os
import statistics
from pathlib import Path
from typing import Self

from lib.errors import UserError

WINDOW = 20
SUSPICIOUS = 3
"""So many hopeless losses in a row, and no checkpoint is made of it."""
EXPLOSION = 10.0
HOPELESS = 2.0
"""A velocity has about unit variance: an answer of zeros costs about 1."""
SKIPPED_IN_A_ROW = 50
MENDS = (
    "Lower learning_rate (a tenth of it is a good next try), keep max_grad_norm at 1, use more "
    "lr_warmup_steps or a larger batch; with mixed_precision=fp16 take bf16 or no"
)


class DivergedError(UserError):
    """The loss is no number or has exploded; what was saved before is sound."""


class LossWatch:
    """Raises DivergedError when the losses say that nothing good can come any more."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses
        self._skipped = 0

    def see(self, loss: float, *, norm: float, scaled: bool) -> None:
        """`norm` is the gradients'; `scaled` means fp16, where a step now and then is skipped on purpose."""
        step = len(self.losses) + 1
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}. {MENDS}.")
        if not math.isfinite(norm):
            self._skipped += 1
            if not scaled or self._skipped >= SKIPPED_IN_A_ROW:
                raise DivergedError(f"the gradients are {norm} at step {step}. {MENDS}.")
        else:
            self._skipped = 0
        self.losses.append(loss)
        if len(self.losses) < 2 * WINDOW:
            return
        if self._exploded(WINDOW):
            now, first = statistics.median(self.losses[-WINDOW:]), statistics.median(self.losses[:WINDOW])
            raise DivergedError(
                f"the loss has exploded: about {now:.3g} over the last {WINDOW} steps up to {step}, "
                f"{first:.3g} at the beginning. {MENDS}."
            )

    def looks_sound(self) -> bool:
        """False as soon as the last few losses look like the beginning of an explosion."""
        if len(self.losses) < WINDOW + SUSPICIOUS:
            return True
        return not self._exploded(SUSPICIOUS)

    def _exploded(self, count: int) -> bool:
        now, first = statistics.median(self.losses[-count:]), statistics.median(self.losses[:WINDOW])
        return now > HOPELESS and now > EXPLOSION * first

    def recent(self) -> float:
        """Mean of the last steps, which the luck of single timesteps does not shake."""
        return statistics.fmean(self.losses[-WINDOW:])


class LossFile:
    """loss.csv with a line a step, as a context manager; what came after a checkpoint is cut off on resuming.

    Writes nothing unless `active`.
    """

    def __init__(self, path: Path, losses: list[float], *, active: bool) -> None:
        self._path, self._losses, self._file = path, losses, None
        self._active = active

    def __enter__(self) -> Self:
        if self._active:
            write_losses(self._path, self._losses)
            self._file = self._path.open("a", newline="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file:
            self._file.close()

    def add(self, step: int, loss: float) -> None:
        if self._file:
            self._file.write(f"{step},{loss!r}\n")
            self._file.flush()


def write_losses(path: Path, losses: list[float]) -> None:
    """The whole file at once; `losses` begin at step 1."""
    partial = path.with_name(path.name + ".partial")
    lines = [f"{step},{loss!r}" for step, loss in enumerate(losses, start=1)]
    partial.write_text("\n".join(["step,loss", *lines]) + "\n")
    os.replace(partial, path)
