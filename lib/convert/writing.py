"""Tensors -> bytes in files, block by block: a folder that appears only when complete, and progress.

No tensor is held in memory as a whole: its values are read, converted, hashed and written a few MB at a time.
"""

import bisect
import hashlib
import itertools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lib.cancellation import check_stop
from lib.convert.report import WrittenFile
from lib.errors import UserError
from lib.progress import Report, progress_line, throttled
from lib.storage.disk import replacing, require_free_space, size_text

BLOCK_ELEMENTS = 4 << 20
REPORT_SECONDS = 1.0
SLACK_BYTES = 4_000_000
"""For headers, configurations and the report."""


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor to write: views of the source whose rows are concatenated."""

    name: str
    pieces: Sequence[Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float = 1.0
    """Every value is multiplied by it, in double precision."""
    source: str = ""
    """Name in messages of the file that it comes from."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


class Progress:
    """Reports every second how many of the planned tensors are written."""

    def __init__(
        self,
        label: str,
        planned: Sequence[PlannedTensor],
        report: Report,
        stop: threading.Event | None = None,
    ) -> None:
        self.label, self.report, self.stop = label, throttled(report, REPORT_SECONDS), stop
        self.ends = list(itertools.accumulate(tensor.nbytes for tensor in planned))
        self.done = 0

    def add(self, count: int) -> None:
        """Count written bytes. Raises Stopped once `stop` is set."""
        check_stop(self.stop)
        self.done += count
        written = bisect.bisect_right(self.ends, self.done)
        line = progress_line(f"converting {self.label}", written, len(self.ends), size_text(self.done))
        self.report(line)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to `target` when the block ends, and removed if it fails.

    The work happens in `target.partial`; what a killed process left there is removed first. Raises UserError
    when `target` exists, NoSpaceError when the disk is full.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} already exists and is not overwritten. Choose another folder.")
    with replacing(target) as partial:
        partial.mkdir(parents=True)
        yield partial


def require_room(folder: Path, planned: Sequence[PlannedTensor]) -> None:
    """Raise NoSpaceError unless the tensors fit on the disk."""
    require_free_space(folder, sum(tensor.nbytes for tensor in planned) + SLACK_BYTES)


class HashingFile:
    """A file that computes the checksum of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sum, self.size = file, hashlib.sha256(), 0
        self._hasher = ThreadPoolExecutor(1)

    def write(self, block: bytes | memoryview) -> int:
        remaining = view = memoryview(block).cast("B")
        hashed = self._hasher.submit(self._sum.update, view)  # while the disk writes
        try:
            while remaining:  # an unbuffered file may take less than it is given
                remaining = remaining[self._file.write(remaining) :]
        finally:
            hashed.result()
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def close(self, not_finite: dict[str, int]) -> WrittenFile:
        """Stop hashing and return the size and checksum."""
        self._hasher.shutdown()
        return WrittenFile(bytes=self.size, sha256=self._sum.hexdigest(), not_finite=not_finite)


def blocks(tensor: PlannedTensor, not_finite: dict[str, int]) -> Iterator[memoryview]:
    """Yield a tensor's bytes in its dtype, a few MB at a time, and count its NaN and infinite values.

    Blocks are views of the source where nothing changes. Raises UserError for a value that the dtype cannot
    represent.
    """
    for piece in tensor.pieces:
        for block in piece.reshape(-1).split(BLOCK_ELEMENTS):
            values = block if tensor.scale == 1 else block.double() * tensor.scale
            stored = values.to(tensor.dtype)
            if not _all_finite(stored):
                _check_range(values, stored, tensor)
                count = int((~stored.isfinite()).sum())
                not_finite[tensor.name] = not_finite.get(tensor.name, 0) + count
            yield stored.contiguous().view(torch.uint8).numpy().data


def _all_finite(values: Tensor) -> bool:
    """Return whether minimum and maximum are finite, in a small fraction of isfinite's time (NaN spreads)."""
    return not values.numel() or all(math.isfinite(float(end)) for end in values.aminmax())


def _check_range(before: Tensor, after: Tensor, tensor: PlannedTensor) -> None:
    """Raise UserError when a finite value became infinite. Only float16 has so small a range, up to 65504."""
    if after.dtype != torch.float16 or before.dtype == torch.float16:
        return
    lost = before[before.isfinite() & ~after.isfinite()]
    if lost.numel():
        raise UserError(
            f"{tensor.source}: {tensor.name} contains {lost.abs().max().item():g}, but float16 ends at "
            "65504. Choose dtype bfloat16 or float32."
        )
