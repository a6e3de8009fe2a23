"""Recognize safetensors files by their first bytes, and read their headers."""

import json
import math
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lib.errors import UserError
from lib.storage.disk import size_text

Kind = Literal["safetensors", "tar"]

# A LoRA on every linear layer of a 5B model has some 800 tensors and a header of 100 kB.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 50_000
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")
PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
TAR_MAGIC_AT = 257


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The names, types and shapes of a safetensors file's tensors, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def kind_of(path: Path, *, name: str) -> Kind:
    """Return the kind of a file. Raises UserError for other kinds, with what the file is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(TAR_MAGIC_AT + 8)
    if start.startswith(COMPRESSED) or start[TAR_MAGIC_AT:].startswith(b"ustar"):
        return "tar"
    if start.startswith(b"PK\x03\x04"):
        wrong = "a zip archive or a PyTorch pickle, which is a zip too; pickles could run any code"
    elif start.startswith(PICKLE_STARTS):
        wrong = "a pickle, and loading one could run any code"
    elif found := describe_text(start):
        wrong = found
    elif size < 10:
        wrong = f"empty or cut off: it has {size} bytes"
    elif start[8:9] == b"{":
        return "safetensors"
    elif _is_old_tar(path):
        return "tar"
    else:
        wrong = "neither a safetensors file nor a tar archive"
    raise UserError(f"{name} is {wrong}. Give a .safetensors file or the tar of a training.")


def describe_text(start: bytes) -> str | None:
    """Return a description of a web page or a Git LFS pointer, None for other files."""
    if start.lstrip()[:1] == b"<":
        return "a web page, not the file itself; copy the address of the download"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file that it points to"
    return None


def read_header(path: Path, *, name: str) -> Header:
    """Read a safetensors file's header. Raises UserError unless it is valid and accounts for every byte."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        (length,) = struct.unpack("<Q", start.ljust(8, b"\xff"))
        if length > MAX_HEADER_BYTES and (text := describe_text(start)):
            raise UserError(f"{name} is {text}.")
        if length > MAX_HEADER_BYTES:
            raise _damaged(
                name,
                f"its header would be {length:,} bytes long; at most {size_text(MAX_HEADER_BYTES)} are read",
            )
        if 8 + length > size:
            raise _damaged(name, f"it has {size:,} bytes but its header alone would have {length:,}")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or len(entries) > MAX_TENSORS:
            raise ValueError
        spans = {key: _tensor(entry) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(name, "its header cannot be read") from error
    end = 0
    for key, (_, first, last) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if first != end:
            raise _damaged(name, f"the bytes of {key[:120]!r} overlap or leave a gap")
        end = last
    if 8 + length + end != size:
        raise _damaged(name, f"it has {size:,} bytes but its header describes {8 + length + end:,}")
    return Header(
        tensors={key: tensor for key, (tensor, _, _) in spans.items()},
        metadata={key: value for key, value in metadata.items() if isinstance(value, str)},
    )


def _tensor(entry: dict[str, Any]) -> tuple[Tensor, int, int]:
    """Return a header's entry with its first and end byte. Raises ValueError when they do not agree."""
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, first, last)):
        raise ValueError
    # Types without a size here are refused by name when the keys are read.
    if dtype in DTYPE_BYTES and last - first != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError
    if last < first:
        raise ValueError
    return Tensor(dtype=dtype, shape=shape), first, last


def _damaged(name: str, reason: str) -> UserError:
    return UserError(f"{name} is not a complete safetensors file: {reason}. It is damaged or cut off.")


def _is_old_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, OSError, EOFError):
        return False
