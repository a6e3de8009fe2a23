"""A checkpoint's tensors by their bare names, mapped from the disk and never unpickled beyond plain data.

A 5B file is 21 GB: nothing of it is read until a tensor's values are used.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.convert.locating import Located, is_torch_zip, locate_weights
from lib.errors import UserError
from lib.lora.file import read_header
from lib.storage import zip_archive
from lib.storage.archive import Stop
from lib.storage.disk import size_text

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = ("module", "state_dict", "model")
MODEL, VAE = "model.diffusion_model.", "first_stage_model."
OTHER_PARTS = {
    "conditioner.": "the text encoder; the released T5 is the same",
    "denoiser.": "the schedule of the noise; it is in the scheduler's configuration",
    "model_ema.": "an averaged copy of the weights",
    "loss_fn.": "of the loss that the model was trained with",
}
WRITTEN_AROUND = ("module.", "_orig_mod.", MODEL)
"""What SAT and training libraries put before a model's names, in any order."""
MAX_WRAPPERS = 6
MAX_LEGACY_BYTES = 2_000_000_000
MAX_PICKLE_BYTES = 256 << 20
"""Of names and shapes; the tensors' values are beside it."""
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
RESAVE = 'torch.save({"module": weights}, "file.pt")'


@dataclass(kw_only=True)
class Checkpoint:
    """What a file holds. Tensors may be views of the file: valid inside open_checkpoint only."""

    name: str
    """What messages call it."""
    tensors: "dict[str, Tensor]"
    """The model's, by their names in it."""
    vae: "dict[str, Tensor]" = field(default_factory=dict)
    """Of the VAE that a fine-tuned file holds beside the model."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Entries and parts that are not used, with the reason."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Of a safetensors file."""
    config: dict[str, Any] | None = None
    """The config.json beside safetensors files."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


@contextmanager
def open_checkpoint(path: Path, *, work: Path, stop: Stop = None) -> Iterator[Checkpoint]:
    """Open a SAT checkpoint or safetensors weights: a file, a folder as SAT downloads come, a zip of one.

    Pickles are read with weights_only and, beyond PyTorch's own list, only the numpy arrays that a full
    DeepSpeed file keeps its random state in. An archive is unpacked into `work`, a folder of the caller's.
    Raises UserError naming the file and the reason for whatever is no such checkpoint; nothing is executed.
    """
    located = locate_weights(Path(path), work=work, stop=stop)
    checkpoint = _from_pickle(located) if located.is_pickle else _from_safetensors(located)
    try:
        yield checkpoint
    finally:
        checkpoint.tensors.clear()
        checkpoint.vae.clear()


def _from_pickle(located: Located) -> Checkpoint:
    content = _load(located.files[0], located.name)
    dropped: dict[str, str] = {}
    weights = _unwrapped(content, dropped, located.name)
    tensors = {}
    for key, value in weights.items():
        if not _is_tensor(value):
            dropped[str(key)[:200]] = "it is no tensor"
        elif not isinstance(key, str):
            raise UserError(f"{located.name} is no checkpoint: it has a tensor named {key!r:.40}.")
        else:
            tensors[key] = _plain(value, key, located.name)
    if not tensors:
        raise UserError(f"{located.name} is no checkpoint: it holds no tensors.")
    return _sorted_into_parts(tensors, Checkpoint(name=located.name, tensors={}, dropped=dropped))


def _from_safetensors(located: Located) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    tensors, metadata = {}, {}
    for file in located.files:
        name = located.name if len(located.files) == 1 else f"{located.name} ({file.name})"
        metadata |= read_header(file, name=name).metadata
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                    tensors[key] = _plain(opened.get_tensor(key), key, name)
        except SafetensorError as error:
            raise UserError(f"{name} is not a complete safetensors file: {error}.") from error
    if not tensors:
        raise UserError(f"{located.name} is no checkpoint: it holds no tensors.")
    config = None
    if located.config is not None:
        with contextlib.suppress(ValueError, RecursionError):
            config = json.loads(located.config.read_bytes())
    checkpoint = Checkpoint(
        name=located.name,
        tensors={},
        metadata=metadata,
        config=config if isinstance(config, dict) else None,
    )
    return _sorted_into_parts(tensors, checkpoint)


def _load(path: Path, name: str) -> Any:
    import torch

    mapped = _check_is_pickle(path, name)
    try:
        with torch.serialization.safe_globals(_numpy_arrays()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
        raise _refusal(str(error), name) from error


def _numpy_arrays() -> list[Any]:
    """What the random state in a DeepSpeed file is made of; numpy renamed its module in between."""
    import numpy as np
    from numpy._core.multiarray import _reconstruct

    return [
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        (_reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype("uint32")),
    ]


def _check_is_pickle(path: Path, name: str) -> bool:
    """Whether the file can be mapped. Raises UserError unless it begins as torch.save's files do."""
    with path.open("rb") as file:
        start = file.read(64)
    if zip_archive.is_zip(path) and is_torch_zip(path):
        _check_members(path, name)
        return True
    if start.startswith(LEGACY_START):
        if (size := path.stat().st_size) > MAX_LEGACY_BYTES:
            raise UserError(
                f"{name} is in PyTorch's format of before 1.6, which has to be read into memory whole, and "
                f"has {size_text(size)}. Load it where there is memory and write it again with {RESAVE}."
            )
        return False
    if start.lstrip()[:1] == b"<":
        wrong = "a web page, not the file itself; copy the address of the download"
    elif start.startswith(b"version https://git-lfs"):
        wrong = "a Git LFS pointer, not the file that it stands for"
    elif not start:
        wrong = "empty"
    elif start[:1] == b"\x80":
        wrong = f"a pickle, but none that torch.save wrote. Write its tensors with {RESAVE}"
    else:
        wrong = "no checkpoint: neither a file of torch.save nor safetensors"
    raise UserError(f"{name} is {wrong}.")


def _check_members(path: Path, name: str) -> None:
    try:
        with zip_archive.opened(path) as archive:
            members = archive.infolist()
    except UserError as error:
        raise UserError(f"{name} is damaged or cut off: its table of contents is missing.") from error
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise UserError(f"{name} is a TorchScript program, not a checkpoint; it is not run.")
    for member in members:
        if member.compress_type or member.compress_size != member.file_size:
            raise UserError(
                f"{name} was packed a second time, compressed; unpack it and write it with {RESAVE}."
            )
        if member.filename.endswith("/data.pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise UserError(f"{name} is refused: its names alone take {size_text(member.file_size)}.")


def _refusal(message: str, name: str) -> UserError:
    if found := re.search(r"GLOBAL ([\w.]+)", message):
        return UserError(
            f"{name} is refused: beside tensors it holds {found[1]}, and loading that could run any code. "
            f"Nothing of it was executed. If you trust the file, write its tensors alone with {RESAVE}."
        )
    if "Weights only" in message or "weights_only" in message:
        return UserError(
            f"{name} is refused: beside tensors it holds what is no plain data. Nothing of it was executed. "
            f"If you trust the file, write its tensors alone with {RESAVE}."
        )
    return UserError(
        f"{name} is damaged or cut off: {message.splitlines()[0][:200] if message else 'unreadable'}"
    )


def _unwrapped(content: Any, dropped: dict[str, str], name: str) -> Mapping[Any, Any]:
    for _ in range(MAX_WRAPPERS):
        if not isinstance(content, Mapping):
            raise UserError(
                f"{name} is no checkpoint: it holds a {type(content).__name__}, not named tensors."
            )
        _refuse_parallel(content, name)
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            return content
        reason = "of the training, not a weight"
        dropped |= {str(key)[:200]: reason for key in content if key != wrapper}
        content = content[wrapper]
    raise UserError(f"{name} is no checkpoint: its tensors are wrapped more than {MAX_WRAPPERS} times.")


def _refuse_parallel(content: Mapping[Any, Any], name: str) -> None:
    size = content.get("mp_world_size")
    if isinstance(size, int) and size > 1:
        raise UserError(
            f"{name} is one of {size} parts of a model-parallel checkpoint: every part holds only some rows. "
            "Merge them first with SAT's own tool, to model_parallel_size 1."
        )


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _plain(tensor: "Tensor", key: str, name: str) -> "Tensor":
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UserError(
            f"{name} cannot be converted: {key[:120]!r} is no plain tensor; quantized files are not."
        )
    if tensor.numel() == 0:
        raise UserError(
            f"{name} holds no weights: {key[:120]!r} is empty, as in the files of ZeRO stage 3, which cuts "
            "the weights up between processes. Join them first with the zero_to_fp32.py that DeepSpeed puts "
            "beside them."
        )
    return tensor.detach()


def _sorted_into_parts(tensors: "dict[str, Tensor]", checkpoint: Checkpoint) -> Checkpoint:
    counts: dict[str, int] = {}
    for written, tensor in tensors.items():
        key = written
        while prefix := next((each for each in WRITTEN_AROUND if key.startswith(each)), None):
            key = key.removeprefix(prefix)
        if key.startswith(VAE):
            place, key = checkpoint.vae, key.removeprefix(VAE)
        elif part := next((each for each in OTHER_PARTS if key.startswith(each)), None):
            counts[part] = counts.get(part, 0) + 1
            continue
        else:
            place = checkpoint.tensors
        if key in place:
            raise UserError(f"{checkpoint.name} holds two tensors that are both {key[:120]!r}.")
        place[key] = tensor
    for part, count in counts.items():
        checkpoint.dropped[f"{part}*"] = f"{count} tensor{'s' * (count > 1)}: {OTHER_PARTS[part]}"
    if not checkpoint.tensors:
        checkpoint.tensors, checkpoint.vae = checkpoint.vae, {}
    return checkpoint
