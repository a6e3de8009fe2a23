"""Open a checkpoint: tensors by bare name, memory-mapped. Nothing of a pickle is executed.

A 5B file has 21 GB: a tensor is read only when its values are used.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib.convert import pickles
from lib.convert.locate import Located, is_torch_zip, locate_weights
from lib.errors import UserError
from lib.lora.cache import CONFIG, read_adapter_config
from lib.lora.file import describe_text, read_header
from lib.sandbox.process import SandboxError
from lib.storage import zip_archive
from lib.storage.disk import size_text

WRAPPERS = ("module", "state_dict", "model")
MODEL, VAE = "model.diffusion_model.", "first_stage_model."
OTHER_PARTS = {
    "conditioner.": "the text encoder; the released T5 is the same",
    "denoiser.": "the noise schedule; it is in the scheduler's configuration",
    "model_ema.": "an averaged copy of the weights",
    "loss_fn.": "part of the loss that the model was trained with",
}
NAME_PREFIXES = ("module.", "_orig_mod.", MODEL)
"""Prefixes that SAT and training libraries add to a model's names, in any order."""
MAX_WRAPPERS = 6
MAX_LEGACY_BYTES = 2_000_000_000
MAX_PICKLE_BYTES = 256 << 20
"""Limit of the names and shapes; the tensors' values are stored separately."""
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
RESAVE = 'torch.save({"module": weights}, "file.pt")'


@dataclass(kw_only=True)
class Checkpoint:
    """The content of a file. Tensors may be views of the file, valid only inside open_checkpoint."""

    name: str
    """Name in messages."""
    tensors: dict[str, Tensor]
    """The model's, by bare name."""
    vae: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the VAE that a fine-tuned file holds in addition to the model."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Entries and parts that are left out -> why."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata of a safetensors file."""
    config: dict[str, Any] | None = None
    """The config.json next to safetensors files."""
    adapter_config: dict[str, Any] | None = None
    """The adapter_config.json next to a LoRA."""


@contextmanager
def open_checkpoint(path: Path, *, stop: threading.Event | None = None) -> Iterator[Checkpoint]:
    """Open a SAT checkpoint or safetensors weights: a file, or the folder of a SAT download.

    A pickle may hold tensors and plain data, and numpy arrays, in which a full DeepSpeed file keeps its
    random state. Nothing of it is executed. Raises UserError naming the file and the reason for anything
    else, and Stopped.
    """
    located = locate_weights(path)
    checkpoint = _from_pickle(located, stop) if located.is_pickle else _from_safetensors(located)
    try:
        yield checkpoint
    finally:
        checkpoint.tensors.clear()
        checkpoint.vae.clear()


def _from_pickle(located: Located, stop: threading.Event | None) -> Checkpoint:
    content = _load(located.files[0], located.name, stop)
    dropped: dict[str, str] = {}
    weights = _unwrapped(content, dropped, located.name)
    tensors = {}
    for key, value in weights.items():
        if not isinstance(value, Tensor) and value is not pickles.NOT_PLAIN:
            dropped[str(key)[:200]] = "not a tensor"
        elif not isinstance(key, str):
            raise UserError(f"{located.name} is not a checkpoint: it has a tensor named {key!r:.40}.")
        else:
            tensors[key] = _plain(value, key, located.name)
    if not tensors:
        raise UserError(f"{located.name} is not a checkpoint: it holds no tensors.")
    return _split_parts(tensors, Checkpoint(name=located.name, tensors={}, dropped=dropped))


def _from_safetensors(located: Located) -> Checkpoint:
    tensors, metadata = {}, {}
    for file in located.files:
        name = located.name if len(located.files) == 1 else f"{located.name} ({file.name})"
        metadata |= read_header(file, name=name).metadata
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    tensors[key] = _plain(opened.get_tensor(key), key, name)
        except SafetensorError as error:
            raise UserError(f"{name} is not a complete safetensors file: {error}.") from error
    if not tensors:
        raise UserError(f"{located.name} is not a checkpoint: it holds no tensors.")
    config = None
    if located.config is not None:
        with contextlib.suppress(ValueError, RecursionError):
            config = json.loads(located.config.read_bytes())
    checkpoint = Checkpoint(
        name=located.name,
        tensors={},
        metadata=metadata,
        config=config if isinstance(config, dict) else None,
        adapter_config=read_adapter_config(located.files[0].with_name(CONFIG), name=located.name),
    )
    return _split_parts(tensors, checkpoint)


def _load(path: Path, name: str, stop: threading.Event | None) -> Any:
    _check_is_pickle(path, name)
    try:
        return pickles.load(path, stop=stop)
    except (SandboxError, ValueError) as error:
        raise _refusal(str(error), name) from error


def _check_is_pickle(path: Path, name: str) -> None:
    """Raise UserError unless a file starts like torch.save's files."""
    with path.open("rb") as file:
        start = file.read(64)
    if zip_archive.is_zip(path) and is_torch_zip(path):
        return _check_members(path, name)
    if start.startswith(LEGACY_START):
        if (size := path.stat().st_size) > MAX_LEGACY_BYTES:
            raise UserError(
                f"{name} is in the format of PyTorch before 1.6, which cannot be mapped, and has "
                f"{size_text(size)}. Load it on a machine with enough memory and save it with {RESAVE}."
            )
        return
    if text := describe_text(start):
        wrong = text
    elif not start:
        wrong = "empty"
    elif start[:1] == b"\x80":
        wrong = f"a pickle that torch.save did not write. Save its tensors with {RESAVE}"
    else:
        wrong = "not a checkpoint: it is neither a torch.save file nor safetensors"
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
                f"{name} was compressed after torch.save wrote it; unpack it and save it with {RESAVE}."
            )
        if member.filename.endswith("/data.pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise UserError(f"{name} is refused: its names alone take {size_text(member.file_size)}.")


def _refusal(message: str, name: str) -> UserError:
    if found := re.search(r"GLOBAL ([\w.]+)", message):
        return UserError(
            f"{name} is refused: in addition to tensors it holds {found[1]}, and loading that could run any "
            f"code. Nothing was executed. If you trust the file, save its tensors alone with {RESAVE}."
        )
    reason = message.removeprefix("damaged ").splitlines()[0][:200] if message else "unreadable"
    return UserError(f"{name} is damaged or cut off: {reason}")


def _unwrapped(content: Any, dropped: dict[str, str], name: str) -> Mapping[Any, Any]:
    for _ in range(MAX_WRAPPERS):
        if not isinstance(content, Mapping):
            kind = content.kind if isinstance(content, pickles.Other) else type(content).__name__
            raise UserError(f"{name} is not a checkpoint: it holds a {kind}, not named tensors.")
        _refuse_parallel(content, name)
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            return content
        reason = "part of the training state, not a weight"
        dropped |= {str(key)[:200]: reason for key in content if key != wrapper}
        content = content[wrapper]
    raise UserError(f"{name} is not a checkpoint: its tensors are wrapped more than {MAX_WRAPPERS} times.")


def _refuse_parallel(content: Mapping[Any, Any], name: str) -> None:
    size = content.get("mp_world_size")
    if isinstance(size, int) and size > 1:
        raise UserError(
            f"{name} is one of {size} parts of a model-parallel checkpoint: every part holds only some rows. "
            "Merge them first with SAT's own tool, to model_parallel_size 1."
        )


def _plain(tensor: Tensor | pickles.Other, key: str, name: str) -> Tensor:
    if isinstance(tensor, pickles.Other):
        raise UserError(
            f"{name} cannot be converted: {key[:120]!r} is not a plain tensor. Quantized files are not "
            "supported."
        )
    if tensor.numel() == 0:
        raise UserError(
            f"{name} holds no weights: {key[:120]!r} is empty, as in files of ZeRO stage 3, which splits "
            "the weights between processes. Join them first with the zero_to_fp32.py that DeepSpeed saves "
            "next to them."
        )
    return tensor


def _split_parts(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> Checkpoint:
    counts: dict[str, int] = {}
    for written, tensor in tensors.items():
        key = written
        while prefix := next((each for each in NAME_PREFIXES if key.startswith(each)), None):
            key = key.removeprefix(prefix)
        if key.startswith(VAE):
            place, key = checkpoint.vae, key.removeprefix(VAE)
        elif part := next((each for each in OTHER_PARTS if key.startswith(each)), None):
            counts[part] = counts.get(part, 0) + 1
            continue
        else:
            place = checkpoint.tensors
        if key in place:
            raise UserError(f"{checkpoint.name} holds two tensors named {key[:120]!r}.")
        place[key] = tensor
    for part, count in counts.items():
        checkpoint.dropped[f"{part}*"] = f"{count} tensor{'s' * (count > 1)}: {OTHER_PARTS[part]}"
    if not checkpoint.tensors:
        checkpoint.tensors, checkpoint.vae = checkpoint.vae, {}
    return checkpoint
