"""Tensors -> a file as torch.save writes it, one tensor at a time, for SAT and torch.load(weights_only=True).

torch.save itself would hold every tensor that is joined from several. Such a file is a zip, uncompressed:
data.pkl, where each tensor is a call of PyTorch's own rebuilding function on a numbered storage, and the
storages beside it.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.convert.writing import HashingFile, Planned, Progress, Written, converted

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
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

    In memory is at most one tensor, and that only where it is joined or changed. Raises UserError for a value
    that its type cannot hold.
    """
    import torch

    named: OrderedDict[str, _Tensor] = OrderedDict()
    for place, tensor in enumerate(planned):
        count = 1
        for side in tensor.shape:
            count *= side
        named[tensor.name] = _Tensor(_Storage(str(place), _storage_type(tensor.dtype), count), tensor.shape)
    content = io.BytesIO()
    _Pickler(content, PROTOCOL).dump({wrapper: named})
    with path.open("xb", buffering=0) as plain:
        file = HashingFile(plain)
        zipped = torch._C.PyTorchFileWriter(file, True, ALIGNMENT)
        data = content.getvalue()
        zipped.write_record("data.pkl", data, len(data))
        zipped.write_record("byteorder", b"little", len(b"little"))
        for place, tensor in enumerate(planned):
            storage = _values(tensor).untyped_storage()
            zipped.write_record(f"data/{place}", storage, tensor.nbytes)
            progress.add(tensor.nbytes)
        zipped.write_end_of_file()
    path.chmod(0o644)
    return file.written()


def _values(tensor: Planned) -> "torch.Tensor":
    """A tensor's values as the whole of a storage."""
    import torch

    whole = torch.empty(tensor.shape, dtype=tensor.dtype).reshape(-1)
    end = 0
    for block in converted(tensor):
        whole[end : end + block.numel()] = block
        end += block.numel()
    return whole


def _storage_type(dtype: "torch.dtype") -> Any:
    import torch

    names = {
        torch.float16: "HalfStorage",
        torch.bfloat16: "BFloat16Storage",
        torch.float32: "FloatStorage",
        torch.float64: "DoubleStorage",
    }
    return getattr(torch, names[dtype])
