"""Recognize safetensors files by their first bytes, and read their headers and alphas."""

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from lib.errors import UserError

Kind = Literal["safetensors", "tar"]

RECORD = "cogvideox"
"""The metadata in which our trainer records base, task and trigger word."""
MAX_TENSORS = 50_000
"""A LoRA on every linear layer of a 5B model has some 800."""
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
    try:
        with safe_open(path, "np") as file:
            if len(keys := file.keys()) > MAX_TENSORS:
                raise UserError(f"{name} has {len(keys):,} tensors; at most {MAX_TENSORS:,} are read.")
            slices = {key: file.get_slice(key) for key in keys}
            return Header(
                tensors={
                    key: Tensor(dtype=each.get_dtype(), shape=tuple(each.get_shape()))
                    for key, each in slices.items()
                },
                metadata=file.metadata() or {},
            )
    except SafetensorError as error:
        with path.open("rb") as file:
            text = describe_text(file.read(TAR_MAGIC_AT))
        reason = str(error).removeprefix("Error while deserializing header: ")
        damage = f"not a complete safetensors file: {reason}. It is damaged or cut off"
        raise UserError(f"{name} is {text or damage}.") from error


def read_alphas(path: Path, keys: Mapping[str, str], name: str) -> dict[str, float]:
    """Read the alphas that are stored as tensors; NaN stands for one that is not a single number."""
    if not keys:
        return {}
    try:
        with safe_open(path, "pt") as file:
            tensors = {module: file.get_tensor(key) for module, key in keys.items()}
    except SafetensorError as error:
        raise UserError(f"{name} is not a complete safetensors file: {error}. Download it again.") from error
    return {module: number(tensor) for module, tensor in tensors.items()}


def number(tensor: Any) -> float:
    """Return the value of a torch tensor with a single number, NaN for others."""
    return float(tensor.double()) if tensor.numel() == 1 else float("nan")


def _is_old_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, OSError, EOFError):
        return False
