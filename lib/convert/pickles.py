"""The tensors of a file that torch.save wrote, memory-mapped; nothing of its pickle is executed.

The names and shapes are read in a child process (lib/convert/pickle_worker.py) with limits on memory and
time.
"""

import json
import math
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, UntypedStorage

from lib.sandbox.process import start
from lib.storage import zip_archive

READER_BYTES = 1 << 30
READER_SECONDS = 10.0
READER_CPU_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Other:
    """A value that is not read, or a tensor that is not a plain one."""

    kind: str


NOT_PLAIN = Other("Tensor")


def load(path: Path, *, stop: threading.Event | None = None) -> Any:
    """Return the content of a torch.save file: mappings, tensors as views of the file, whole numbers, Other.

    Raises:
        SandboxError: The pickle is damaged, names something that is not allowed, or takes too much memory or
            time.
        ValueError: A tensor lies outside the file.
        Stopped: `stop` was set.
    """
    members = _members(path) if zip_archive.is_zip(path) else {}
    pickled = next((place for name, place in members.items() if name.endswith("/data.pkl")), (-1, 0))
    with start(
        "lib.convert.pickle_worker",
        [str(path.absolute()), *map(str, pickled)],
        memory_bytes=READER_BYTES,
        seconds=READER_SECONDS,
        cpu_seconds=READER_CPU_SECONDS,
        stop=stop,
    ) as reader:
        table = json.loads(reader.receive(b"T"))
    prefix = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), "")
    file = UntypedStorage.from_file(str(path), False, path.stat().st_size)
    storages: dict[str, UntypedStorage] = {}

    def storage(key: str) -> UntypedStorage:
        if key not in storages:
            place = members.get(f"{prefix}data/{key}") if members else table["storages"].get(key)
            if place is None:
                raise ValueError(f"the values of its storage {key[:40]} are missing")
            offset, size = place
            if size < 0 or offset + size > file.nbytes():
                raise ValueError(f"its storage {key[:40]} lies outside the file")
            part = cast("UntypedStorage", file[offset : offset + size])
            storages[key] = part if offset % 8 == 0 else part.clone()  # in the old format
        return storages[key]

    return _content(table["content"], storage)


def _members(path: Path) -> dict[str, tuple[int, int]]:
    """Return offset and size of the uncompressed members of a zip."""
    with zip_archive.opened(path) as archive, path.open("rb") as file:
        places = {}
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            lengths = file.read(4)
            if len(lengths) == 4:
                places[member.filename] = (
                    member.header_offset + 30 + sum(struct.unpack("<HH", lengths)),
                    member.file_size,
                )
    return places


def _content(described: dict[str, Any], storage: Callable[[str], UntypedStorage]) -> Any:
    if "items" in described:
        return {key: _content(value, storage) for key, value in described["items"]}
    if "int" in described:
        return described["int"]
    if "tensor" in described:
        return _tensor(described["tensor"], storage)
    return Other(described["other"])


def _tensor(facts: list[Any] | None, storage: Callable[[str], UntypedStorage]) -> Tensor | Other:
    if facts is None:
        return NOT_PLAIN
    key, dtype_name, offset, shape, strides = facts
    dtype = getattr(torch, dtype_name or "", None)
    if not isinstance(dtype, torch.dtype) or len(shape) != len(strides):
        return NOT_PLAIN
    if offset < 0 or any(number < 0 for number in (*shape, *strides)):
        raise ValueError("a tensor has a negative size")
    values = storage(key)
    held = values.nbytes() // dtype.itemsize
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and last >= held:
        raise ValueError(f"a tensor of shape {shape} lies outside its values")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(values, offset, shape, strides)
