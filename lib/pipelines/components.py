"""A checkpoint's components, read from its folder straight to the device where they will be used."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

OFFLINE = {"local_files_only": True}


def load_components(
    folder: Path, *, dtype: torch.dtype, device: str = "cpu", text_encoder: bool = True
) -> dict[str, Any]:
    """Return name -> component, as a diffusers pipeline takes them; models in `dtype` on `device`.

    The text encoder's weights are read while the other models are built. Without `text_encoder`, it and the
    tokenizer are None. Raises OSError or RuntimeError for components that are missing or incomplete.
    """
    classes = json.loads((folder / "model_index.json").read_bytes())
    # from_pretrained changes process-wide state of torch, so that only files may be read in another thread.
    with ThreadPoolExecutor(max_workers=1) as pool:
        reading, encoder_class = None, getattr(transformers, classes["text_encoder"][1])
        if text_encoder:
            reading = pool.submit(_read_tensors, folder / "text_encoder", encoder_class, dtype, device)
        options: dict[str, Any] = {"use_safetensors": True, "torch_dtype": dtype, **OFFLINE}
        if device != "cpu":
            options["device_map"] = {"": device}
        components: dict[str, Any] = {
            name: getattr(diffusers, classes[name][1]).from_pretrained(folder / name, **options)
            for name in ("transformer", "vae")
        }
        scheduler = getattr(diffusers, classes["scheduler"][1])
        components["scheduler"] = scheduler.from_pretrained(folder / "scheduler", **OFFLINE)
        if not reading:
            return components | {"tokenizer": None, "text_encoder": None}
        components["tokenizer"] = getattr(transformers, classes["tokenizer"][1]).from_pretrained(
            folder / "tokenizer", **OFFLINE
        )
        components["text_encoder"] = _build_text_encoder(
            folder / "text_encoder", encoder_class, reading.result()
        )
    return components


def _read_tensors(folder: Path, model_class: Any, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Return the encoder's tensors in `dtype` on `device`."""
    # T5's output projections overflow in float16: https://github.com/huggingface/transformers/issues/20287
    exact = set(model_class._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    tensors = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt", device=device) as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                if name.startswith("decoder."):  # of a complete T5, as large as the encoder
                    continue
                kept = torch.float32 if exact & set(name.split(".")) else dtype
                tensors[name] = opened.get_tensor(name).to(kept)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that from_pretrained reads: next to them there may be variants in other precisions."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        raise OSError(f"{folder} has neither {single.name} nor {index.name}.")
    shards = json.loads(index.read_bytes())["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def _build_text_encoder(folder: Path, model_class: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return transformers' model with these tensors as its weights, on their device.

    from_pretrained would reserve the GPU memory a second time. Raises RuntimeError for missing weights.
    """
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_pretrained(folder, **OFFLINE))
    for alias, name in (model._tied_weights_keys or {}).items():  # files may have either name
        if alias in tensors:
            tensors.setdefault(name, tensors[alias])
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise RuntimeError(f"{folder} is incomplete: it has no {', '.join(missing[:5])}.")
    return model.eval().requires_grad_(False)
