"""A checkpoint's parts, read from its folder to the device where they will be, without the network."""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.pipelines.lean_imports import import_diffusers
from lib.pipelines.text_encoder import TextEncoder, is_ours, load_text_encoder, read_tensors
from lib.pipelines.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

OFFLINE = {"local_files_only": True}


def load_components(
    folder: Path, *, dtype: "torch.dtype", device: str = "cpu", text_encoder: bool = True
) -> dict[str, Any]:
    """Name -> part, as a diffusers pipeline takes them; models in `dtype` on `device`, for inference.

    Without the text encoder, it and the tokenizer are None. On a GPU it is read beside the others. Raises
    OSError or RuntimeError for parts that are missing or incomplete.
    """
    diffusers = import_diffusers()
    classes = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    text_folder = folder / "text_encoder"
    ours = text_encoder and is_ours(text_folder)
    # On a CPU only one thread may compute, see lib/predictors/compute_thread.py.
    reading = _begin_reading(text_folder, dtype, device) if ours and device != "cpu" else None
    options = {"use_safetensors": True, "torch_dtype": dtype, **OFFLINE}
    if device != "cpu":
        options["device_map"] = {"": device}
    components: dict[str, Any] = {
        name: getattr(diffusers, classes[name][1]).from_pretrained(folder / name, **options)
        for name in ("transformer", "vae")
    }
    scheduler = getattr(diffusers, classes["scheduler"][1])
    components["scheduler"] = scheduler.from_pretrained(folder / "scheduler", **OFFLINE)
    if not text_encoder:
        return components | {"tokenizer": None, "text_encoder": None}
    components["tokenizer"] = load_tokenizer(folder / "tokenizer", classes["tokenizer"][1])
    if ours:
        tensors = reading.result() if reading else read_tensors(text_folder, dtype=dtype, device=device)
        components["text_encoder"] = load_text_encoder(text_folder, tensors)
    else:
        components["text_encoder"] = _other_text_encoder(
            text_folder, classes["text_encoder"][1], dtype, device
        )
    return components


def load_tokenizer(folder: Path, name: str) -> Any:
    """Ours if it can read the folder, else transformers' class `name`."""
    ours = Tokenizer.load(folder)
    if ours is not None:
        return ours
    import transformers

    return getattr(transformers, name).from_pretrained(folder, **OFFLINE)


def _other_text_encoder(folder: Path, name: str, dtype: "torch.dtype", device: str) -> "TextEncoder | Any":
    import transformers

    from lib.pipelines.load import silence_libraries

    silence_libraries()
    encoder = getattr(transformers, name).from_pretrained(
        folder, dtype=dtype, use_safetensors=True, **OFFLINE
    )
    return encoder.to(device)


def _begin_reading(folder: Path, dtype: "torch.dtype", device: str) -> Future:
    pool = ThreadPoolExecutor(max_workers=1)
    future = pool.submit(read_tensors, folder, dtype=dtype, device=device)
    pool.shutdown(wait=False)
    return future
