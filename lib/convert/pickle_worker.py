"""The child process that reads the names and shapes in a torch.save file; lib/convert/pickles.py runs it.

Unpickling calls what the file names. Here every name that is allowed stands for an object that computes
nothing: what it is called with is recorded for tensors and forgotten otherwise. Values of tensors are not
read. Only the standard library is imported, so that a start takes a twentieth of a second.

The arguments are the path, and offset and size of the pickle in it; offset -1 asks for the format of PyTorch
before 1.6. The one message, `T`, is JSON: {"content": ..., "storages": ...}. In `content` a mapping is
{"items": [[key, content], ...]}, a tensor {"tensor": [storage, dtype, offset, shape, strides]}, a whole
number {"int": value}, and anything else {"other": name of its type}. `storages` maps each storage of the old
format to the offset of its values in the file and their size in bytes.
"""

import io
import json
import pickle
import re
import struct
import sys
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Self

from lib.sandbox.child import Out, Refused, run

STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
"""Types of storages -> dtype of the tensors in them."""
ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
PLAIN_TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
PARAMETERS = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
OTHER_TENSORS = {
    "_rebuild_device_tensor_from_cpu_tensor",
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_from_type_v2",
    "_rebuild_meta_tensor_no_storage",
    "_rebuild_nested_tensor",
    "_rebuild_qtensor",
    "_rebuild_sparse_tensor",
    "_rebuild_wrapper_subclass",
}
DROPPED = {
    "_codecs": {"encode"},
    "builtins": {"bytearray", "complex", "set"},
    "__builtin__": {"bytearray", "complex", "set"},
    "collections": {"Counter"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct"},
    "numpy._core.multiarray": {"_reconstruct"},
    "numpy.dtypes": {"UInt32DType"},
}
"""Names that checkpoints hold beside tensors, such as the random state in a DeepSpeed file."""
TORCH = {"torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse", "torch.storage"}
DTYPE = re.compile(r"[a-z]+\d*(_[a-z0-9]+)*")
"""Names such as float8_e4m3fn and per_tensor_affine; whatever they are, they are only compared."""
MAX_TABLE_BYTES = 32 << 20
MAX_DEPTH = 8
"""How deep mappings are listed; a checkpoint wraps its tensors in fewer."""


class Inert:
    """Stands for a value that is not read: accepts whatever a pickle does to it."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return object.__new__(cls)

    def _ignore(self, *_: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


class Tensor(Inert):
    """A tensor with the arguments it would be rebuilt from; None where it is not a plain one."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class Constant(Inert):
    """A type or function of torch, by name."""

    def __init__(self, name: str, result: type[Inert] = Inert) -> None:
        self.name, self._result = name, result

    def __call__(self, *arguments: Any) -> Inert:
        if self.name in PARAMETERS:
            return arguments[0] if arguments and type(arguments[0]) is Tensor else Tensor()
        if self.name in PLAIN_TENSORS:
            dtype = arguments[6] if self.name == "_rebuild_tensor_v3" and len(arguments) > 6 else None
            return Tensor(*arguments[:4], dtype.name if type(dtype) is Constant else None)
        return self._result()


class Pairs(dict):
    """An OrderedDict, which takes no attributes and computes nothing."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        if arguments and type(arguments[0]) in (list, tuple):
            for pair in arguments[0]:
                if type(pair) in (list, tuple) and len(pair) == 2 and type(pair[0]) in (str, int):
                    self[pair[0]] = pair[1]

    def __setstate__(self, *_: Any) -> None: ...


class Storage(Inert):
    """A reference to values: [type, key, ...], as torch.save's persistent ids have them."""

    def __init__(self, type_name: str, key: str) -> None:
        self.type_name, self.key = type_name, key


class Reader(pickle.Unpickler):
    """An unpickler that executes nothing. Raises Refused for a name that is not allowed."""

    def __init__(self, file: BinaryIO | io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, str] = {}
        """Key of each storage -> its type."""

    def find_class(self, module: str, name: str) -> Any:
        if (found := allowed(module, name)) is None:
            raise Refused(f"GLOBAL {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is not tuple or len(pid) < 3 or pid[0] != "storage" or type(pid[1]) is not Constant:
            return Inert()
        if len(pid) > 5 and pid[5] is not None:
            return Inert()  # a part of another storage, which only PyTorch before 0.4 wrote
        storage = Storage(pid[1].name, str(pid[2])[:200])
        self.storages[storage.key] = storage.type_name
        return storage


@cache
def allowed(module: str, name: str) -> Any:
    """Return what stands for a name in a pickle, None for one that is refused."""
    if (module, name) == ("collections", "OrderedDict"):
        return Pairs
    if (module, name) == ("torch.nn.parameter", "Parameter"):
        return Constant("_rebuild_parameter")
    if name in DROPPED.get(module, ()):
        return type(name, (Inert,), {})
    if module in ("torch._utils", "torch._tensor"):
        if name in PLAIN_TENSORS | PARAMETERS:
            return Constant(name)
        return Constant(name, Tensor) if name in OTHER_TENSORS else None
    if module in TORCH and name.endswith("Tensor"):
        return Constant(name, Tensor)
    if module in TORCH and (name.endswith("Storage") or (module == "torch" and DTYPE.fullmatch(name))):
        return Constant(name)
    return None


def serve(arguments: list[str], out: Out) -> None:
    path, offset, size = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    try:
        with path.open("rb") as file:
            if offset < 0:
                content, storages = _legacy(file)
            else:
                file.seek(offset)
                content, storages = Reader(io.BytesIO(file.read(size))).load(), {}
        described = _describe(content, 0)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        raise Refused(f"damaged {error}"[:300]) from None
    table = json.dumps({"content": described, "storages": storages}).encode()
    if len(table) > MAX_TABLE_BYTES:
        raise Refused(f"damaged its names and shapes take {len(table):,} bytes")
    out.send(b"T", table)


def _legacy(file: BinaryIO) -> tuple[Any, dict[str, list[int]]]:
    """Read the pickles of the old format, and where each storage lies that follows them."""
    for _ in ("magic number", "protocol version", "system"):
        Reader(file).load()
    reader = Reader(file)
    content = reader.load()
    places = {}
    for key in Reader(file).load():
        (count,) = struct.unpack("<q", file.read(8))
        dtype = STORAGES.get(reader.storages.get(str(key)[:200], ""), "uint8")
        size = count * ITEM_BYTES.get(dtype, 1)
        places[str(key)[:200]] = [file.tell(), size]
        file.seek(max(size, 0), 1)
    return content, places


def _describe(content: Any, depth: int) -> dict[str, Any]:
    if isinstance(content, dict) and depth <= MAX_DEPTH:
        return {"items": [[_key(key), _describe(value, depth + 1)] for key, value in content.items()]}
    if isinstance(content, Tensor):
        return {"tensor": _plain(content)}
    if type(content) is int and abs(content) < 1 << 62:
        return {"int": content}
    return {"other": type(content).__name__[:80]}


def _key(key: Any) -> str | int:
    return key if type(key) in (str, int) else f"a {type(key).__name__}"


def _plain(tensor: Tensor) -> list[Any] | None:
    """Return [storage, dtype, offset, shape, strides], None for a tensor of another kind."""
    if len(tensor.arguments) < 4:
        return None
    storage, offset, shape, strides, *dtype = tensor.arguments
    if not isinstance(storage, Storage) or type(offset) is not int:
        return None
    for sizes in (shape, strides):
        if type(sizes) is not tuple or len(sizes) > 64 or not all(type(size) is int for size in sizes):
            return None
    name = dtype[0] if dtype and dtype[0] else STORAGES.get(storage.type_name)
    return [storage.key, name, offset, list(shape), list(strides)]


if __name__ == "__main__":
    sys.exit(run(serve))
