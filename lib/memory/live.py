"""Counting what is alive at once, for walks through a model's code in bytes instead of values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

FLOAT = 4
UNFOLDED = 20480
"""PyTorch convolves one clip in float32 by columns when channels * frames * rows are no more than this
(use_mkldnn in aten/src/ATen/native/Convolution.cpp), and gives all others to oneDNN."""


@dataclass(slots=True)
class Live:
    """Bytes alive now, and the most there have been."""

    now: int = 0
    peak: int = 0

    def add(self, size: int) -> int:
        """A tensor of so many bytes is made; returns its size, to be dropped later."""
        self.now += size
        self.peak = max(self.peak, self.now)
        return size

    def drop(self, *sizes: int) -> None:
        self.now -= sum(sizes)

    def touch(self, size: int) -> None:
        """Made and dropped at once, as a kernel's own scratch space is."""
        self.peak = max(self.peak, self.now + size)

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Alive inside the block only."""
        self.add(size)
        yield
        self.drop(size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """What the kernels of a device need beside their operands and results."""

    device: Literal["cpu", "cuda"]
    itemsize: int

    def convolution(self, channels: tuple[int, int], window: int, before: tuple[int, ...], after: int) -> int:
        """Scratch bytes of a convolution from channels[0] to channels[1] over `window` places.

        before are frames, rows and columns of its input with its padding in time; after are the places of
        its output. On a CPU oneDNN copies the input into an order of its own; in 16 bits it holds either that
        or the result in float32, whichever is larger. cuDNN is taken to copy input and result.
        """
        frames, rows, columns = before
        given = channels[0] * frames * rows * columns * self.itemsize
        made = channels[1] * after * self.itemsize
        weights = channels[0] * channels[1] * window * self.itemsize
        if self.device == "cuda":
            return given + made
        if self.itemsize < FLOAT:
            return max(given, channels[1] * after * FLOAT) + weights
        if window == 1:
            return 0
        if channels[0] * frames * rows <= UNFOLDED:
            return channels[0] * window * after * self.itemsize
        return given + weights
