"""Find the files that hold the weights: an input file or folder -> one pickle, or safetensors files."""

import codecs
import json
import os.path
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError
from lib.models.layout import INDEX
from lib.storage import zip_archive

LATEST = "latest"
"""SAT and DeepSpeed write the name of the last step's folder into this file, next to the folder."""
STATES = "mp_rank_00_model_states.pt"
SAT_VAE = "3d-vae.pt"
OPTIMIZER_ENDING = "_optim_states.pt"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
INDEX_ENDING = ".safetensors.index.json"
MAX_LATEST_BYTES = 1000
MAX_INDEX_BYTES = 64 << 20
LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Located:
    """Files with weights: one pickle, or one or more safetensors files; messages call them `name`."""

    name: str
    files: tuple[Path, ...]
    config: Path | None = None
    """The config.json next to safetensors files."""

    @property
    def is_pickle(self) -> bool:
        return self.files[0].suffix != ".safetensors" and not _starts_like_safetensors(self.files[0])


def locate_weights(path: Path) -> Located:
    """Find the weights in a file or folder.

    SAT's downloads hold `latest` and 1000/mp_rank_00_model_states.pt; diffusers' components hold safetensors
    files. Raises UserError when there are no weights, when several files could be meant, for ZeRO-3 shards
    and for one part of a model-parallel checkpoint.
    """
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    if path.is_dir():
        return _in_folder(path, path.name)
    _refuse_by_name(path, path.name)
    config = path.parent / "config.json"
    if path.name.endswith(INDEX_ENDING):
        return _sharded(path, path.name)
    safe = path.suffix == ".safetensors" and config.is_file()
    return Located(name=path.name, files=(path,), config=config if safe else None)


def find_vae(path: Path) -> Path | None:
    """Return the 3d-vae.pt next to `latest` in a SAT folder, where to_sat writes it; None without one."""
    latest = _latest(path) if path.is_dir() else None
    vae = latest.with_name(SAT_VAE) if latest else None
    return vae if vae and vae.is_file() else None


def is_torch_zip(path: Path) -> bool:
    """Return whether a file is a zip that torch.save wrote."""
    if not zip_archive.is_zip(path):
        return False
    try:
        with zip_archive.opened(path) as members:
            return any(member.endswith("/data.pkl") for member in members.namelist())
    except UserError:
        return True  # damaged: reading it as a checkpoint gives the better message


def _starts_like_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:9] == b"{" and start[6:8] == b"\0\0"


def _in_folder(folder: Path, name: str) -> Located:
    if latest := _latest(folder):
        return _of_step(latest, name)
    indices = sorted(folder.glob(f"*{INDEX_ENDING}"))
    if indices:
        return _sharded(indices[0], name)
    for found in (sorted(folder.glob("*.safetensors")), _pickles(folder)):
        models = _models([file for file in found if not file.name.startswith("._")])
        if len(models) > 1:
            _refuse_shards(models, name)
            listed = ", ".join(str(file.relative_to(folder)) for file in models[:LISTED])
            raise UserError(
                f"{name} holds {len(models)} files of weights ({listed}{' ...' * (len(models) > LISTED)}); "
                "give one of them."
            )
        if models:
            _refuse_by_name(models[0], name)
            config = models[0].parent / "config.json"
            return Located(name=name, files=(models[0],), config=config if config.is_file() else None)
    if (folder / INDEX).is_file():
        raise UserError(
            f"{name} is already a complete model in the diffusers layout; direction=to_sat converts it back. "
            "A single file or folder of weights is needed here."
        )
    if (folder / "vae").is_dir():
        raise UserError(f"{name} holds a VAE, in its folder vae, but no transformer; give it as vae alone.")
    raise UserError(
        f"{name} holds no weights: neither {LATEST} next to a folder with {STATES}, nor a .pt or "
        ".safetensors file."
    )


def _latest(folder: Path) -> Path | None:
    """Return the topmost file called `latest`: archives wrap different numbers of folders around it."""
    found = sorted(folder.rglob(LATEST), key=lambda path: (len(path.parts), path))
    return next((path for path in found if path.is_file()), None)


def _pickles(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in PICKLES and path.is_file())


def _of_step(latest: Path, name: str) -> Located:
    with latest.open("rb") as file:
        step = _decode(file.read(MAX_LATEST_BYTES)).strip()
    folder = latest.parent / step
    if step in ("", "..") or Path(step).name != step or not os.path.isdir(folder):
        raise UserError(
            f"{name}: its file {LATEST} names {step[:80]!r}, but there is no such folder next to it."
        )
    _refuse_shards(sorted(folder.glob("*.pt")), name)
    if not (folder / STATES).is_file():
        raise UserError(f"{name}: its folder {step} has no {STATES}.")
    return Located(name=f"{name} ({step}/{STATES})", files=(folder / STATES,))


def _decode(text: bytes) -> str:
    """Decode a line of text by its byte order mark, as Windows' editors and shells write it."""
    is_utf_16 = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return text.decode("utf-16" if is_utf_16 else "utf-8-sig", "replace")


def _refuse_by_name(path: Path, name: str) -> None:
    siblings = sorted(path.parent.glob("mp_rank_*_model_states.pt")) if path.name == STATES else []
    _refuse_shards([path, *siblings], name)


def _refuse_shards(files: list[Path], name: str) -> None:
    names = [file.name for file in _models(files)]
    if shards := [file for file in names if file.startswith("zero_pp_rank_")]:
        raise UserError(
            f"{name} holds shards of ZeRO stage 3 ({shards[0]}): the weights are split between processes. "
            "Join them first with the zero_to_fp32.py that DeepSpeed saves next to them."
        )
    if parts := [file for file in names if file.startswith("mp_rank_") and file != STATES]:
        raise UserError(
            f"{name} is one part of a model-parallel checkpoint ({parts[0]}): every part holds only "
            "some rows. Merge them first with SAT's own tool, to model_parallel_size 1."
        )


def _models(files: list[Path]) -> list[Path]:
    """Leave out optimizer states, which ZeRO stages 1 and 2 save in shards next to complete weights."""
    if not any(file.name == STATES for file in files):
        return files
    return [file for file in files if not file.name.endswith(OPTIMIZER_ENDING)]


def _sharded(index: Path, name: str) -> Located:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not files or not all(isinstance(file, str) for file in files):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{name}: {index.name} is not an index of safetensors files.") from None
    if missing := [
        file for file in files if Path(file).name != file or not os.path.isfile(index.parent / file)
    ]:
        raise UserError(f"{name} is incomplete: {missing[0]} of {index.name} is missing.")
    config = index.parent / "config.json"
    return Located(
        name=name,
        files=tuple(index.parent / file for file in files),
        config=config if config.is_file() else None,
    )
