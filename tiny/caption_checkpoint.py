"""Saving a CaptionModel in the layout of the released checkpoint."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from lib.caption.checkpoint import INDEX, OUR_INV_FREQ, SINGLE, entries
from lib.caption.config import ARCHITECTURE, CaptionConfig
from lib.caption.model import CaptionModel

SHARD_BYTES = 5_000_000_000


def save_model(model: CaptionModel, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and weights into an existing folder, with an index if there are several shards."""
    tensors = _released_tensors(model)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if size + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    _write_config(model.config, folder, dtype=str(model.dtype).removeprefix("torch."))
    names = [SINGLE]
    if len(shards) > 1:
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
        os.chmod(folder / name, 0o644)  # safetensors files are readable by their owner only


def _released_tensors(model: CaptionModel) -> dict[str, torch.Tensor]:
    ours = model.state_dict()
    found = {}
    for key, entry in entries(model).items():
        parts = [ours[name] for name in entry.names]
        # The frequencies are written for every layer; a file cannot contain a tensor twice.
        copied = len(parts) > 1 or entry.names == (OUR_INV_FREQ,)
        found[key] = torch.cat(parts) if copied else parts[0].contiguous()
    return found


def _write_config(config: CaptionConfig, folder: Path, *, dtype: str) -> None:
    """Write config.json as in the released model, without the names of the code that it ships."""
    content = {"architectures": [ARCHITECTURE], **asdict(config), "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
