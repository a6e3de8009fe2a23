"""Tensors -> files, piece by piece: a folder appears whole or not at all, and no tensor is held in memory.

A safetensors file is a length of 8 bytes, a JSON header and the tensors' bytes one after the other, so it can
be written while it is read: header first, then blocks of a few MB, hashed on the way.
"""

import bisect
import hashlib
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lib.cancellation import check_stop
from lib.errors import UserError
from lib.progress import Report
from lib.storage.archive import Stop
from lib.storage.disk import disk_error, require_free_space, size_text

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2_000_000_000
BLOCK_ELEMENTS = 4 << 20
REPORT_SECONDS = 5.0
TENSORS_SECONDS = 1.0
SLACK_BYTES = 4_000_000
"""For headers, configurations and the report."""
NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""Of the types that weights are written in, in a safetensors header."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor to be written: views of the source whose rows, one after the other, are its values."""

    name: str
    pieces: "Sequence[torch.Tensor]"
    shape: tuple[int, ...]
    dtype: "torch.dtype"
    scale: float = 1.0
    """Every value is multiplied by it, in double precision."""
    source: str = ""
    """What messages call the file that it comes from."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(kw_only=True)
class Written:
    """One finished file."""

    bytes: int
    sha256: str
    not_finite: dict[str, int] = field(default_factory=dict)
    """How many values are NaN or infinite, by the tensor's name; what has none is left out."""


@dataclass(kw_only=True)
class Progress:
    """Says every few seconds how much of a whole is written.

    With `ends`, the bytes after which each tensor is done, in progress lines that count tensors.
    """

    label: str
    total: int
    report: Report
    stop: Stop = None
    ends: Sequence[int] = ()
    done: int = 0
    _last: float = field(default_factory=time.monotonic)

    def add(self, count: int) -> None:
        """Count bytes. Raises Stopped once the work is to end."""
        check_stop(self.stop)
        self.done += count
        if self.ends:
            self._count_tensors()
        elif time.monotonic() - self._last >= REPORT_SECONDS:
            self._last = time.monotonic()
            share = 100 * self.done // max(1, self.total)
            self.report(f"{self.label}: {size_text(self.done)} of {size_text(self.total)} ({share} %)")

    def _count_tensors(self) -> None:
        if time.monotonic() - self._last < TENSORS_SECONDS and self.done < self.total:
            return
        self._last = time.monotonic()
        written = bisect.bisect_right(self.ends, self.done)
        self.report(
            f"progress: converting {self.label} {written}/{len(self.ends)}, {size_text(self.done)}"
        )  # fmt: skip


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that gets its name, `target`, when the block ends; until then, and if it fails, it has none.

    The work happens in `target.partial`, also what a killed process left there goes. Raises UserError when
    `target` exists, NoSpaceError when the disk is full.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; nothing is written over it. Choose another folder.")
    partial = target.with_name(target.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise disk_error(error, partial) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_room(folder: Path, planned: Sequence[Planned]) -> None:
    """Raise NoSpaceError unless the tensors fit on the disk."""
    require_free_space(folder, sum(tensor.nbytes for tensor in planned) + SLACK_BYTES)


def write_safetensors(
    folder: Path,
    stem: str,
    planned: Sequence[Planned],
    progress: Progress,
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> dict[str, Written]:
    """Write tensors into an existing folder as `stem`.safetensors, or as shards and then their index.

    Returns the files by name. Raises UserError for a value that its type cannot hold.
    """
    shards = _shards(planned, shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [
            f"{stem}-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(1, len(shards) + 1)
        ]
    written = {
        name: _write_shard(folder / name, shard, metadata or {}, progress)
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in planned)},
            "weight_map": {
                tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
            },
        }
        place = folder / f"{stem}.safetensors.index.json"
        place.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        place.chmod(0o644)
    return written


def _shards(planned: Sequence[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shard(path: Path, shard: list[Planned], metadata: dict[str, str], progress: Progress) -> Written:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for tensor in shard:
        kind = NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[tensor.name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8, as the format asks
    with path.open("xb", buffering=0) as plain:
        file = HashingFile(plain)
        file.write(struct.pack("<Q", len(text)) + text)
        odd: dict[str, int] = {}
        for tensor in shard:
            for block in blocks(tensor, odd):
                file.write(block)
                progress.add(len(block))
    path.chmod(0o644)
    return file.written(odd)


class HashingFile:
    """A file that knows the checksum of what was written to it, in order."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sum, self.size = file, hashlib.sha256(), 0
        self._hasher = ThreadPoolExecutor(1)

    def write(self, block: bytes | memoryview) -> int:
        whole = left = memoryview(block).cast("B")
        hashed = self._hasher.submit(self._sum.update, whole)  # while the disk writes
        try:
            while left:  # an unbuffered file may take less than it is given
                left = left[self._file.write(left) :]
        finally:
            hashed.result()
        self.size += len(whole)
        return len(whole)

    def flush(self) -> None:
        self._file.flush()

    def written(self, not_finite: dict[str, int]) -> Written:
        """What was written, once nothing more is."""
        self._hasher.shutdown()
        return Written(bytes=self.size, sha256=self._sum.hexdigest(), not_finite=not_finite)


def blocks(tensor: Planned, odd: dict[str, int]) -> Iterator[memoryview]:
    """A tensor's bytes in its type, a few MB at a time; values that are NaN or infinite are counted in `odd`.

    Raises UserError for a value that the type cannot hold.
    """
    for values in _converted(tensor, odd):
        yield memoryview(_bytes(values))


def _converted(tensor: Planned, odd: dict[str, int]) -> "Iterator[torch.Tensor]":
    """A tensor's values in its type, in flat blocks; views of the source where nothing changes."""
    for piece in tensor.pieces:
        for block in piece.reshape(-1).split(BLOCK_ELEMENTS):
            values = block
            if tensor.scale != 1:
                values = values.double() * tensor.scale
            stored = values.to(tensor.dtype)
            if not _all_finite(stored):
                _check_range(values, stored, tensor)
                odd[tensor.name] = odd.get(tensor.name, 0) + int((~stored.isfinite()).sum())
            yield stored


def _all_finite(values: "torch.Tensor") -> bool:
    """By the least and the greatest value, which are NaN where one is: in a small part of isfinite's time."""
    return not values.numel() or all(math.isfinite(end) for end in values.aminmax())


def _check_range(before: "torch.Tensor", after: "torch.Tensor", tensor: Planned) -> None:
    """Of the types used, float16 alone ends early, at 65504."""
    import torch

    if after.dtype != torch.float16 or before.dtype == torch.float16:
        return
    lost = before[before.isfinite() & ~after.isfinite()]
    if lost.numel():
        raise UserError(
            f"{tensor.source}: {tensor.name} holds {lost.abs().max().item():g}, and float16 ends at 65504. "
            "Choose dtype bfloat16 or float32."
        )


def _bytes(values: "torch.Tensor"):  # type: ignore[no-untyped-def]
    import torch

    return values.contiguous().view(torch.uint8).numpy()
