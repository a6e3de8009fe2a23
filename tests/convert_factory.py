"""Real outputs of SAT's own code at tiny sizes (tests/data/sat), and random checkpoints in SAT's layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from lib.convert.configs import FAMILIES, transformer_config, vae_config
from lib.convert.detect import TransformerSizes, VaeSizes
from lib.convert.keymap import TRANSFORMER, VAE, plan_to_sat, shape_of
from lib.convert.planning import model_shapes
from lib.convert.reading import MODEL

ORACLES = Path(__file__).parent / "data" / "sat"
VARIANTS = ("t2v-2b", "t2v-2b-finetuned", "t2v-5b", "i2v-5b", "t2v-1.5-5b", "i2v-1.5-5b")
FAMILY_OF = {
    "t2v-2b": "cogvideox-2b",
    "t2v-2b-finetuned": "cogvideox-2b",
    "t2v-5b": "cogvideox-5b",
    "i2v-5b": "cogvideox-5b-i2v",
    "t2v-1.5-5b": "cogvideox1.5-5b",
    "i2v-1.5-5b": "cogvideox1.5-5b-i2v",
}
VAE_FILE = ORACLES / "sat" / "vae.pt"
State = dict[str, torch.Tensor]


def source(name: str) -> Path:
    return ORACLES / "sat" / f"{name}.pt"


def expected(name: str) -> State:
    return load_file(ORACLES / "expected" / f"{name}.safetensors")


def expected_config(name: str) -> dict:
    return json.loads((ORACLES / "expected" / f"{name}.config.json").read_text())


def inputs_and_outputs(name: str) -> State:
    return load_file(ORACLES / "io" / f"{name}.safetensors")


def options(name: str) -> dict:
    """Return the options that cannot be read from these tiny models' weights."""
    frames = expected_config(name)["sample_frames"]
    sizes = {"sample_height": 6, "sample_width": 8, "sample_frames": frames, "max_text_seq_length": 6}
    return sizes | {"norm_num_groups": 2}


def stored(folder: Path) -> State:
    """Return all tensors of a component's folder, from all its shards."""
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def config(folder: Path) -> dict:
    content = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in content.items() if not key.startswith("_")}


def states(folder: Path) -> State:
    """Return the tensors of a result in SAT's layout."""
    step = (folder / "latest").read_text()
    file = folder / step / "mp_rank_00_model_states.pt"
    return torch.load(file, weights_only=True)["module"]


def sizes(**changes) -> TransformerSizes:
    """Return the sizes of a tiny 2B-like transformer."""
    usual = {
        "heads": 2, "head_dim": 16, "layers": 2, "in_channels": 4, "out_channels": 4, "patch_size": 2,
        "patch_size_t": None, "time_embed_dim": 16, "text_embed_dim": 24, "ofs_embed_dim": None,
        "positions": 0, "rotary": None,
    }  # fmt: skip
    return TransformerSizes(**usual | changes)


def sat_transformer(*, family: str = "cogvideox-2b", device: str = "cpu", **changes) -> State:
    """Return a random SAT transformer by its bare names, without the buffers that diffusers drops."""
    shapes = model_shapes("transformer", transformer_config(sizes(**changes), FAMILIES[family], {}))
    plan = plan_to_sat(list(shapes), TRANSFORMER)
    generator = None if device == "meta" else torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape_of(pieces, shapes), generator=generator, device=device)
        for name, pieces in plan.outputs.items()
    }


def sat_vae() -> State:
    """Return the released VAE by SAT's names, as meta tensors."""
    sizes = VaeSizes(
        channels=(128, 256, 256, 512), latent_channels=16, layers_per_block=3, in_channels=3, out_channels=3
    )
    shapes = model_shapes("vae", vae_config(sizes, FAMILIES["cogvideox-5b"], {}))
    plan = plan_to_sat(list(shapes), VAE, levels=4)
    return {name: torch.empty(shape_of(p, shapes), device="meta") for name, p in plan.outputs.items()}


def sat_lora(*, layers: int, rank: int, width: int = 8, dtype: torch.dtype = torch.float32) -> State:
    """Return a random SAT LoRA by its bare names."""
    torch.manual_seed(0)
    state = {}
    for layer in range(layers):
        for module, count in (("query_key_value", 3), ("dense", 1)):
            for part in range(count):
                place = f"transformer.layers.{layer}.attention.{module}.matrix_"
                state[f"{place}A.{part}"] = torch.randn(rank, width).to(dtype)
                state[f"{place}B.{part}"] = torch.randn(width, rank).to(dtype)
    return state


def save_sat(
    path: Path, state: State, *, wrappers: tuple[str, ...] = ("module",), prefix: str = MODEL
) -> Path:
    content: dict = {prefix + name: tensor for name, tensor in state.items()}
    for wrapper in reversed(wrappers):
        content = {wrapper: content}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def silent(line: str) -> None:
    """Ignore progress."""


def same_states(found: State, wanted: State) -> bool:
    """Return whether two state dicts are bit-equal."""
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
