"""The two file formats, safetensors and torch.save, written block by block and checked by opening them again.

A safetensors file is a length of 8 bytes, a JSON header and the tensors' bytes one after the other. A torch
file is an uncompressed zip: data.pkl, where each tensor is a call of PyTorch's own rebuilding function on a
numbered storage, and the storages. torch.save would hold every concatenated tensor in memory, and its writer
aborts the process when the disk is full.
"""

import inspect
import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch._utils import _rebuild_tensor_v2

from lib.convert.keymap import Shape
from lib.convert.locate import LATEST, STATES
from lib.convert.planning import model_shapes
from lib.convert.report import WrittenFile
from lib.convert.writing import HashingFile, PlannedTensor, Progress, blocks

SHARD_BYTES = 2_000_000_000
SAFETENSORS_DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
STEP = "1"
"""The step's folder in a SAT result."""

ALIGNMENT = 64
ROOT = "archive"
VERSION = b"3\n"
"""Version of the torch file's layout."""
PROTOCOL = 2
"""The pickle protocol that torch.save uses."""
STORAGES = {
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
}


class CheckFailed(RuntimeError):
    """A result differs from what was planned: a fault of the conversion or of the disk, not of the input."""


def write_safetensors(
    folder: Path,
    stem: str,
    planned: Sequence[PlannedTensor],
    progress: Progress,
    *,
    shard_bytes: int | None = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, WrittenFile]:
    """Write `stem`.safetensors into a folder, or shards and their index, and return the files by name.

    `shard_bytes` None writes a single file. Raises UserError for a value that its dtype cannot represent.
    """
    shards = _shards(planned, shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{place:05d}-of-{len(shards):05d}.safetensors" for place, _ in enumerate(shards, 1)]
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
        write_text(
            folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n"
        )
    return written


def write_torch(
    path: Path, wrapper: str, planned: Sequence[PlannedTensor], progress: Progress
) -> WrittenFile:
    """Write {wrapper: {name: tensor}} into the new file `path`, for SAT and torch.load(weights_only=True).

    Raises UserError for a value that its dtype cannot represent.
    """
    named: OrderedDict[str, _Tensor] = OrderedDict()
    for place, tensor in enumerate(planned):
        storage = _Storage(str(place), STORAGES[tensor.dtype], math.prod(tensor.shape))
        named[tensor.name] = _Tensor(storage, tensor.shape)
    content = io.BytesIO()
    _Pickler(content, PROTOCOL).dump({wrapper: named})
    not_finite: dict[str, int] = {}
    with path.open("xb", buffering=0) as plain:
        file = HashingFile(plain)
        with zipfile.ZipFile(file, "w") as members:  # pyright: ignore[reportCallIssue, reportArgumentType] (it only writes and flushes)
            _add_member(members, file, "data.pkl", len(content.getvalue()), [content.getvalue()])
            _add_member(members, file, "byteorder", len(b"little"), [b"little"])
            for place, tensor in enumerate(planned):
                values = blocks(tensor, not_finite)
                _add_member(members, file, f"data/{place}", tensor.nbytes, values, progress)
            _add_member(members, file, "version", len(VERSION), [VERSION])
    path.chmod(0o644)
    return file.close(not_finite)


def write_states(
    folder: Path, planned: Sequence[PlannedTensor], progress: Progress
) -> dict[str, WrittenFile]:
    """Write {"module": ...} where SAT looks for it: `latest` and the step's folder."""
    (folder / STEP).mkdir()
    written = write_torch(folder / STEP / STATES, "module", planned, progress)
    write_text(folder / LATEST, STEP)
    return {f"{STEP}/{STATES}": written}


def write_config(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a configuration as diffusers' class `kind` does: defaults and version included, keys sorted."""
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    complete = {each.name: each.default for each in parameters if each.default is not each.empty}
    complete |= {"_class_name": kind, "_diffusers_version": diffusers.__version__, **content}
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(complete, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file that everyone may read."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)


def check_component(folder: Path, component: str) -> str:
    """Compare a component's files with the model that diffusers creates from its config.json."""
    config = json.loads((folder / "config.json").read_bytes())
    expected = model_shapes(component, {key: config[key] for key in config if not key.startswith("_")})
    found: dict[str, Shape] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    _compare(found, expected, folder)
    return f"all {len(expected)} names and shapes match diffusers {diffusers.__version__}"


def check_lora(path: Path, planned: Sequence[PlannedTensor]) -> str:
    """Read a LoRA as diffusers' pipeline does and compare its names and shapes."""
    state: Any = diffusers.CogVideoXPipeline.lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True
    )
    expected = {tensor.name: tensor.shape for tensor in planned}
    _compare({name: tuple(tensor.shape) for name, tensor in state.items()}, expected, path)
    return f"all {len(expected)} names and shapes match when diffusers reads the file"


def check_torch(path: Path, wrapper: str, planned: Sequence[PlannedTensor]) -> str:
    """Open a torch file with torch.load(weights_only=True) and compare names, shapes and dtypes."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[wrapper]
    _compare(
        {name: tuple(tensor.shape) for name, tensor in content.items()},
        {tensor.name: tensor.shape for tensor in planned},
        path,
    )
    for tensor in planned:
        if content[tensor.name].dtype != tensor.dtype:
            raise CheckFailed(f"{path}: {tensor.name} is {content[tensor.name].dtype}, not {tensor.dtype}")
    return f"all {len(planned)} names, shapes and types match when torch.load reads the file"


def _compare(found: Mapping[str, Shape], expected: Mapping[str, Shape], path: Path) -> None:
    different = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if different:
        name = different[0]
        raise CheckFailed(
            f"{path}: {name} is {found.get(name)} and should be {expected.get(name)}; {len(different)} differ"
        )


def _shards(planned: Sequence[PlannedTensor], shard_bytes: int | None) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and shard_bytes is not None and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shard(
    path: Path, shard: list[PlannedTensor], metadata: Mapping[str, str], progress: Progress
) -> WrittenFile:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for tensor in shard:
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the values at a multiple of 8
    not_finite: dict[str, int] = {}
    with path.open("xb", buffering=0) as plain:
        file = HashingFile(plain)
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in shard:
            for block in blocks(tensor, not_finite):
                file.write(block)
                progress.add(len(block))
    path.chmod(0o644)
    return file.close(not_finite)


class _Storage:
    """Stands for the values of one tensor, stored in the member data/`key`."""

    def __init__(self, key: str, kind: Any, count: int) -> None:
        self.key, self.kind, self.count = key, kind, count


class _Tensor:
    """Pickled as a tensor that covers its storage."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides, step = [], 1
        for side in reversed(self.shape):
            strides.append(step)
            step *= side
        strides.reverse()
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, tuple(strides), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if isinstance(obj, _Storage):
            return "storage", obj.kind, obj.key, "cpu", obj.count
        return None


def _add_member(
    members: zipfile.ZipFile,
    file: HashingFile,
    name: str,
    size: int,
    content: Iterable[bytes | memoryview],
    progress: Progress | None = None,
) -> None:
    """Write one member with its bytes at a multiple of ALIGNMENT, so that the file can be memory-mapped."""
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
