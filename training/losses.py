"""The losses of a run: the curve on disk, and the check that training has not diverged."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.errors import UserError
from lib.storage.disk import replacing

WINDOW = 20
SUSPICIOUS = 3
"""After this many losses above HOPELESS in a row no checkpoint is written."""
EXPLOSION = 10.0
HOPELESS = 2.0
"""A velocity has about unit variance: predicting zeros costs about 1."""
SKIPPED_IN_A_ROW = 50
ADVICE = (
    "Lower learning_rate (a tenth of it is a good next try), keep max_grad_norm at 1, use more "
    "lr_warmup_steps or a larger batch; with mixed_precision=fp16 use bf16 or no"
)


class DivergedError(UserError):
    """The loss is not finite or has exploded; checkpoints written before can be used."""


class LossWatch:
    """Collects the losses and raises DivergedError when training cannot recover."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses
        self._skipped = 0

    def add(self, loss: float, *, norm: float, scaled: bool) -> None:
        """Check and add a loss. With `scaled` (fp16) the norm of the gradients may be infinite at times."""
        step = len(self.losses) + 1
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}. {ADVICE}.")
        if not math.isfinite(norm):
            self._skipped += 1
            if not scaled or self._skipped >= SKIPPED_IN_A_ROW:
                raise DivergedError(f"the gradients are {norm} at step {step}. {ADVICE}.")
        else:
            self._skipped = 0
        self.losses.append(loss)
        if len(self.losses) < 2 * WINDOW:
            return
        if self._exploded(WINDOW):
            now, first = statistics.median(self.losses[-WINDOW:]), statistics.median(self.losses[:WINDOW])
            raise DivergedError(
                f"the loss has exploded: about {now:.3g} over the last {WINDOW} steps up to {step}, "
                f"{first:.3g} at the beginning. {ADVICE}."
            )

    def looks_sound(self) -> bool:
        """Return False as soon as the last few losses look like the start of an explosion."""
        if len(self.losses) < WINDOW + SUSPICIOUS:
            return True
        return not self._exploded(SUSPICIOUS)

    def _exploded(self, count: int) -> bool:
        now, first = statistics.median(self.losses[-count:]), statistics.median(self.losses[:WINDOW])
        return now > HOPELESS and now > EXPLOSION * first

    def recent(self) -> float:
        """Return the mean of the last steps, which depends less on the timesteps that were drawn."""
        return statistics.fmean(self.losses[-WINDOW:])


@contextlib.contextmanager
def loss_file(path: Path, losses: list[float], *, active: bool) -> Iterator[Callable[[int, float], None]]:
    """Open loss.csv with the losses so far, and give a function that adds a step's line.

    Steps after the checkpoint that a run resumes from are cut off. Nothing is written unless `active`.
    """
    if not active:
        yield lambda step, loss: None
        return
    write_losses(path, losses)
    with path.open("a", newline="") as file:

        def add(step: int, loss: float) -> None:
            file.write(f"{step},{loss!r}\n")
            file.flush()

        yield add


def write_losses(path: Path, losses: list[float]) -> None:
    """Write the complete file in one step; `losses` start at step 1."""
    lines = [f"{step},{loss!r}" for step, loss in enumerate(losses, start=1)]
    with replacing(path) as partial:
        partial.write_text("\n".join(["step,loss", *lines]) + "\n")
