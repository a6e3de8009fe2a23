"""What a person hands over (a file, a folder, a zip of one) -> the files that hold the weights."""

import json
import os.path
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError
from lib.models.layout import INDEX
from lib.storage import zip_archive
from lib.storage.archive import Stop, archive_kind, extract_archive

LATEST = "latest"
"""Beside the folder of the last step, whose name is in it, as SAT and DeepSpeed write."""
STATES = "mp_rank_00_model_states.pt"
SAT_VAE = "3d-vae.pt"
OPTIMIZER_ENDING = "_optim_states.pt"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
INDEX_ENDING = ".safetensors.index.json"
MAX_LATEST_BYTES = 1000
MAX_INDEX_BYTES = 64 << 20
NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where weights are: one pickle, or one or more safetensors files; `name` is what messages call them."""

    name: str
    files: tuple[Path, ...]
    config: Path | None = None
    """The config.json beside safetensors files."""

    @property
    def is_pickle(self) -> bool:
        return self.files[0].suffix != ".safetensors" and not _begins_as_safetensors(self.files[0])


def locate_weights(path: Path, *, work: Path, max_bytes: int | None = None, stop: Stop = None) -> Located:
    """Find the weights in a file, a folder or an archive of one, which is unpacked into `work`.

    SAT's downloads hold `latest` and 1000/mp_rank_00_model_states.pt; diffusers' components hold safetensors
    files. Raises UserError when there is nothing, when it is not clear which file is meant, for ZeRO-3 shards
    and for one part of several (model parallel).
    """
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    if path.is_dir():
        return _in_folder(path, path.name)
    if _is_archive(path):
        folder = extract_archive(path, work / "unpacked", max_bytes=max_bytes, stop=stop)
        return _in_folder(folder, path.name)
    _refuse_by_name(path, path.name)
    config = path.parent / "config.json"
    if path.name.endswith(INDEX_ENDING):
        return _sharded(path, path.name)
    safe = path.suffix == ".safetensors" and config.is_file()
    return Located(name=path.name, files=(path,), config=config if safe else None)


def vae_beside(path: Path) -> Path | None:
    """The VAE in a folder of SAT's, beside `latest`, where conversion to SAT puts it; None without one."""
    latest = _latest(path) if path.is_dir() else None
    vae = latest.with_name(SAT_VAE) if latest else None
    return vae if vae and vae.is_file() else None


def is_torch_zip(path: Path) -> bool:
    """Whether the file is a zip as torch.save writes it."""
    if not zip_archive.is_zip(path):
        return False
    try:
        with zip_archive.opened(path) as members:
            return any(member.endswith("/data.pkl") for member in members.namelist())
    except UserError:
        return True  # damaged; as a checkpoint it gets the better message


def _is_archive(path: Path) -> bool:
    if zip_archive.is_zip(path):
        return not is_torch_zip(path)
    return path.suffix not in (*PICKLES, ".safetensors", ".json") and archive_kind(path) == "tar"


def _begins_as_safetensors(path: Path) -> bool:
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
        whole = _models([file for file in found if not file.name.startswith("._")])
        if len(whole) > 1:
            _refuse_shards(whole, name)
            listed = ", ".join(str(file.relative_to(folder)) for file in whole[:NAMED])
            raise UserError(
                f"{name} holds {len(whole)} files of weights ({listed}{' ...' * (len(whole) > NAMED)}); "
                "give the one that is meant."
            )
        if whole:
            _refuse_by_name(whole[0], name)
            config = whole[0].parent / "config.json"
            return Located(name=name, files=(whole[0],), config=config if config.is_file() else None)
    if (folder / INDEX).is_file():
        raise UserError(
            f"{name} is a whole model in the layout of diffusers already; direction=to_sat converts it back. "
            "What is read here is one part: a file or a folder of weights."
        )
    if (folder / "vae").is_dir():
        raise UserError(f"{name} holds a VAE, in its folder vae, and no transformer; give it as vae alone.")
    raise UserError(
        f"{name} holds no weights: neither {LATEST} beside a folder with {STATES}, nor a .pt or "
        ".safetensors file."
    )


def _latest(folder: Path) -> Path | None:
    """The file of that name, the nearest first: archives differ in how many folders they wrap around it."""
    found = sorted(folder.rglob(LATEST), key=lambda path: (len(path.parts), path))
    return next((path for path in found if path.is_file()), None)


def _pickles(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in PICKLES and path.is_file())


def _of_step(latest: Path, name: str) -> Located:
    with latest.open("rb") as file:
        step = file.read(MAX_LATEST_BYTES).decode("utf-8", "replace").strip()
    folder = latest.parent / step
    if step in ("", "..") or Path(step).name != step or not os.path.isdir(folder):
        raise UserError(
            f"{name}: its file {LATEST} names {step[:80]!r}, and there is no such folder beside it."
        )
    _refuse_shards(sorted(folder.glob("*.pt")), name)
    if not (folder / STATES).is_file():
        raise UserError(f"{name}: its folder {step} holds no {STATES}.")
    return Located(name=f"{name} ({step}/{STATES})", files=(folder / STATES,))


def _refuse_by_name(path: Path, name: str) -> None:
    siblings = sorted(path.parent.glob("mp_rank_*_model_states.pt")) if path.name == STATES else []
    _refuse_shards([path, *siblings], name)


def _refuse_shards(files: list[Path], name: str) -> None:
    names = [file.name for file in _models(files)]
    if shards := [file for file in names if file.startswith("zero_pp_rank_")]:
        raise UserError(
            f"{name} holds shards of ZeRO stage 3 ({shards[0]}): the weights are cut up between processes. "
            "Join them first with the zero_to_fp32.py that DeepSpeed puts beside them."
        )
    if parts := [file for file in names if file.startswith("mp_rank_") and file != STATES]:
        raise UserError(
            f"{name} is one part of a model-parallel checkpoint ({parts[0]}): every part holds only "
            "some rows. Merge them first with SAT's own tool, to model_parallel_size 1."
        )


def _models(files: list[Path]) -> list[Path]:
    """Without the optimizer's states, which ZeRO's stages 1 and 2 cut up beside whole weights."""
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
        raise UserError(f"{name}: {index.name} is no index of safetensors files.") from None
    if missing := [
        file for file in files if Path(file).name != file or not os.path.isfile(index.parent / file)
    ]:
        raise UserError(f"{name} is not whole: {missing[0]} of {index.name} is missing.")
    config = index.parent / "config.json"
    return Located(
        name=name,
        files=tuple(index.parent / file for file in files),
        config=config if config.is_file() else None,
    )
