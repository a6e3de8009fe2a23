"""Count the bytes of tensors that are alive at once while a model runs, on the meta device or any other."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Device = Literal["cpu", "cuda"]

UNFOLDED = 20480
"""PyTorch convolves one clip in float32 by columns when batch * channels * frames * rows are no more than
this (use_mkldnn in aten/src/ATen/native/Convolution.cpp), and gives all others to oneDNN."""
CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default)


class LiveBytes(TorchDispatchMode):
    """Inside the block: bytes of storages that operations made and that still exist.

    With `device`, also the temporary buffers of its kernels.
    """

    def __init__(self, device: Device | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device: Device | None = device
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.group_norm.default and args[0].is_meta:
            result = torch.empty_like(args[0])  # the meta kernel takes half of the time of a decoder
        else:
            result = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._watch(storage)
        scratch = scratch_bytes(self._device, func, args, result) if self._device else 0
        self.peak = max(self.peak, self.now + scratch)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def release(_: weakref.ref[torch.UntypedStorage]) -> None:
            self.now -= size
            self._known.pop(key, None)

        self.now += size
        self._known[key] = weakref.ref(storage, release)


def scratch_bytes(device: Device, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> int:
    """Return what a kernel allocates for itself.

    For convolutions oneDNN copies the input into an order of its own; in 16 bits it holds either that or the
    result in float32, whichever is larger. cuDNN is assumed to copy input and result. Flash attention on a
    CPU packs key and value in 16 bits.
    """
    if func is torch.ops.aten.scaled_dot_product_attention.default:
        query, key, value = args[:3]
        return key.nbytes + value.nbytes if device == "cpu" and query.itemsize < 4 else 0
    if func not in CONVOLUTIONS:
        return 0
    source, weight = args[:2]
    if device == "cuda":
        return source.nbytes + result.nbytes
    if source.itemsize < 4:
        return max(source.nbytes, result.numel() * 4) + weight.nbytes
    window = prod(weight.shape[2:])
    if window == 1:
        return 0
    if prod(source.shape[:-1]) <= UNFOLDED:
        return source.shape[1] * window * result.numel() // result.shape[1] * result.itemsize
    return source.nbytes + weight.nbytes


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for each in tree:
            yield from _tensors(each)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
