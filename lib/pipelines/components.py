"""A checkpoint's components, read from its folder straight to the device where they will be used."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file

OFFLINE = {"local_files_only": True}


def load_components(
    folder: Path, *, dtype: torch.dtype, device: str = "cpu", text_encoder: bool = True
) -> dict[str, Any]:
    """Return name -> component, as a diffusers pipeline takes them; models in `dtype` on `device`.

    The text encoder's weights are read while the other models are built. Without `text_encoder`, it and the
    tokenizer are None. Raises OSError or RuntimeError for components that are missing or incomplete.
    """
    classes = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    # from_pretrained changes process-wide state of torch, so that only files may be read in another thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        reading = pool.submit(_read_tensors, folder / "text_encoder", device) if text_encoder else None
        options: dict[str, Any] = {"use_safetensors": True, "torch_dtype": dtype, **OFFLINE}
        if device != "cpu":
            options["device_map"] = {"": device}
        components: dict[str, Any] = {
            name: getattr(diffusers, classes[name][1]).from_pretrained(folder / name, **options)
            for name in ("transformer", "vae")
        }
        scheduler = getattr(diffusers, classes["scheduler"][1])
        components["scheduler"] = scheduler.from_pretrained(folder / "scheduler", **OFFLINE)
        if reading is None:
            return components | {"tokenizer": None, "text_encoder": None}
        components["tokenizer"] = getattr(transformers, classes["tokenizer"][1]).from_pretrained(
            folder / "tokenizer", **OFFLINE
        )
        components["text_encoder"] = _build_text_encoder(
            folder / "text_encoder", classes["text_encoder"][1], reading.result(), dtype=dtype, device=device
        )
    return components


def _read_tensors(folder: Path, device: str) -> dict[str, torch.Tensor]:
    """Return the tensors of all safetensors files of a folder, as they are stored, on `device`."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(f"{folder} has no safetensors file.")
    return {name: tensor for file in files for name, tensor in load_file(file, device=device).items()}


def _build_text_encoder(
    folder: Path, kind: str, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype, device: str
) -> Any:
    """Return transformers' model `kind` with these weights. Raises RuntimeError where some are missing."""
    options: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    model_class = getattr(transformers, kind)
    config = model_class.config_class.from_pretrained(folder, **OFFLINE)
    model, loading = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
    )
    if missing := sorted(loading["missing_keys"]):
        raise RuntimeError(f"{folder} is incomplete: it has no {', '.join(missing[:5])}.")
    return model
