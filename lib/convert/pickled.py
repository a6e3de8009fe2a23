"""Tensors -> a file as torch.save writes it, block by block, for SAT and torch.load(weights_only=True).

torch.save would hold every tensor that is joined from several, and the writer beneath it ends the process
when the disk is full. Such a file is a zip, uncompressed: data.pkl, where each tensor is a call of PyTorch's
own rebuilding function on a numbered storage, and the storages beside it.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.convert.writing import HashingFile, Planned, Progress, Written, blocks

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
ROOT = "archive"
VERSION = b"3\n"
"""Of the layout of the file."""
PROTOCOL = 2
"""What torch.save uses."""


class _Storage:
    """Stands for the values of one tensor, which are in the member data/`key`."""

    def __init__(self, key: str, kind: Any, count: int) -> None:
        self.key, self.kind, self.count = key, kind, count


class _Tensor:
    """Pickled as a tensor over the whole of a storage."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        from torch._utils import _rebuild_tensor_v2

        strides, step = [], 1
        for side in reversed(self.shape):
            strides.append(step)
            step *= side
        strides.reverse()
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, tuple(strides), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if isinstance(value, _Storage):
            return "storage", value.kind, value.key, "cpu", value.count
        return None


def write_pickle(path: Path, wrapper: str, planned: Sequence[Planned], progress: Progress) -> Written:
    """Write {wrapper: {name: tensor}} into the new file `path`.

    Raises UserError for a value that its type cannot hold.
    """
    named: OrderedDict[str, _Tensor] = OrderedDict()
    for place, tensor in enumerate(planned):
        storage = _Storage(str(place), _storage_type(tensor.dtype), math.prod(tensor.shape))
        named[tensor.name] = _Tensor(storage, tensor.shape)
    content = io.BytesIO()
    _Pickler(content, PROTOCOL).dump({wrapper: named})
    odd: dict[str, int] = {}
    with path.open("xb", buffering=0) as plain:
        file = HashingFile(plain)
        with zipfile.ZipFile(file, "w") as members:
            _add(members, file, "data.pkl", len(content.getvalue()), [content.getvalue()])
            _add(members, file, "byteorder", len(b"little"), [b"little"])
            for place, tensor in enumerate(planned):
                _add(members, file, f"data/{place}", tensor.nbytes, blocks(tensor, odd), progress)
            _add(members, file, "version", len(VERSION), [VERSION])
    path.chmod(0o644)
    return file.written(odd)


def _add(
    members: zipfile.ZipFile,
    file: HashingFile,
    name: str,
    size: int,
    content: Iterable[bytes | memoryview],
    progress: Progress | None = None,
) -> None:
    """Write one member, its bytes at a multiple of ALIGNMENT, so that they can be mapped as numbers."""
    member = zipfile.ZipInfo(f"{ROOT}/{name}")
    large = size > zipfile.ZIP64_LIMIT // 2
    header = 30 + len(member.filename) + 4 + (20 if large else 0)
    padding = -(file.size + header) % ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with members.open(member, "w", force_zip64=large) as target:
        for block in content:
            target.write(block)
            if progress is not None:
                progress.add(len(block))


def _storage_type(dtype: "torch.dtype") -> Any:
    import torch

    names = {
        torch.float16: "HalfStorage",
        torch.bfloat16: "BFloat16Storage",
        torch.float32: "FloatStorage",
        torch.float64: "DoubleStorage",
    }
    return getattr(torch, names[dtype])
