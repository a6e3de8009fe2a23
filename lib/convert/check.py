"""The finished files, opened again as their users will and compared name by name with what they should be."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.convert.keymap import Shape
from lib.convert.planning import model_shapes
from lib.convert.writing import Planned


class CheckFailed(RuntimeError):
    """The result is not what was planned: a fault of the conversion or of the disk, not of the input."""


def check_component(folder: Path, component: str) -> str:
    """Compare a component's files with the model that diffusers makes of its config.json, without values."""
    import diffusers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    expected = model_shapes(component, {key: config[key] for key in config if not key.startswith("_")})
    _compare(_stored(sorted(folder.glob("*.safetensors"))), expected, folder)
    return f"all {len(expected)} names and shapes are those of diffusers {diffusers.__version__}"


def check_lora(path: Path, expected: Mapping[str, Shape]) -> str:
    """Read a LoRA as diffusers' pipeline does and compare its names and shapes."""
    from diffusers import CogVideoXPipeline

    state = CogVideoXPipeline.lora_state_dict(path.parent, weight_name=path.name, local_files_only=True)
    _compare({name: tuple(tensor.shape) for name, tensor in state.items()}, expected, path)
    return f"all {len(expected)} names and shapes come back through diffusers"


def check_sat(path: Path, wrapper: str, planned: Sequence[Planned]) -> str:
    """Open a SAT file with torch.load(weights_only=True) and compare names, shapes and types."""
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[wrapper]
    _compare(
        {name: tuple(tensor.shape) for name, tensor in content.items()},
        {tensor.name: tensor.shape for tensor in planned},
        path,
    )
    for tensor in planned:
        if content[tensor.name].dtype != tensor.dtype:
            raise CheckFailed(f"{path}: {tensor.name} is {content[tensor.name].dtype}, not {tensor.dtype}")
    return f"all {len(planned)} names, shapes and types come back through torch.load"


def _stored(files: list[Path]) -> dict[str, Shape]:
    from safetensors import safe_open

    found: dict[str, Shape] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def _compare(found: Mapping[str, Shape], expected: Mapping[str, Shape], place: Path) -> None:
    odd = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if odd:
        raise CheckFailed(
            f"{place}: {odd[0]} is {found.get(odd[0])} and should be {expected.get(odd[0])}; "
            f"{len(odd)} differ"
        )
