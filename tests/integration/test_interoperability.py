"""A trained lora.safetensors has the trained effect with other versions of diffusers and peft too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from lib.lora.attach import Loras
from lib.lora.source import Choice, parse
from lib.models.specs import SPECS
from tests.lora_factory import WEIGHTS
from training.adapter import add_adapter, save_adapter
from training.objective import rotary_tables

pytestmark = pytest.mark.slow

MODEL = WEIGHTS / "tiny-t2v"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]
RANK, ALPHA = 4, 1.5
OLD = {"peft": "0.17.1", "transformers": "4.56.2", "tokenizers": "0.22.1", "huggingface_hub": "0.35.3"}
READS_ALPHA = [{"diffusers": "0.35.1"} | OLD, {"diffusers": "0.42.1", "peft": "0.20.0"}]
"""Version of each package; the others are those of this environment."""
IGNORES_ALPHA = {"diffusers": "0.33.1"} | OLD
UNREACHABLE = "connection broken by"
"""What pip prints when it cannot reach an index."""

# Runs with the other versions: argv is model, LoRA, inputs, outputs, strength, and the expected versions.
PROGRAM = """
import sys
from importlib.metadata import version
from pathlib import Path

import diffusers, peft, torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

model, lora, inputs, outputs, strength, *expected = sys.argv[1:]
assert [f"{pin.partition('==')[0]}=={version(pin.partition('==')[0])}" for pin in expected] == expected
assert expected[0] == f"diffusers=={diffusers.__version__}" and f"peft=={peft.__version__}" in expected
parts = {"vae": None, "text_encoder": None, "tokenizer": None}
transformer = CogVideoXTransformer3DModel.from_pretrained(Path(model) / "transformer")
pipeline = CogVideoXPipeline.from_pretrained(model, transformer=transformer, **parts)
pipeline.load_lora_weights(lora)
if strength != "1":
    pipeline.set_adapters(pipeline.get_active_adapters(), float(strength))
given = load_file(inputs)
rotary = given.pop("cos"), given.pop("sin")
with torch.no_grad():
    output = transformer(**given, image_rotary_emb=rotary, return_dict=False)[0]
save_file({"output": output}, outputs)
"""


def base() -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(MODEL / "transformer")


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """Return a file that the trainer's writer made of random matrices."""
    torch.manual_seed(0)
    transformer = base()
    for parameter in add_adapter(transformer, rank=RANK, alpha=ALPHA, targets=TARGETS):
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("trained") / "lora.safetensors"
    save_adapter(transformer, path, {"base": "tiny-t2v"}, dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    config, generator = base().config, torch.Generator().manual_seed(1)
    shape = (1, 3, config.in_channels, config.sample_height, config.sample_width)
    cos, sin = rotary_tables(config, torch.Size(shape), "cpu")
    text = (1, config.max_text_seq_length, config.text_embed_dim)
    return {
        "hidden_states": torch.randn(shape, generator=generator),
        "encoder_hidden_states": torch.randn(text, generator=generator),
        "timestep": torch.tensor([400]),
        "cos": cos.contiguous(),
        "sin": sin.contiguous(),
    }


def answer(transformer: CogVideoXTransformer3DModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    given = {name: value for name, value in inputs.items() if name not in ("cos", "sin")}
    with torch.no_grad():
        rotary = inputs["cos"], inputs["sin"]
        return transformer(**given, image_rotary_emb=rotary, return_dict=False)[0]


def merged(lora: Path, scale: float) -> CogVideoXTransformer3DModel:
    """Return the transformer with scale * B @ A added to its weights, without peft."""
    transformer, matrices = base(), load_file(lora)
    for key in [key for key in matrices if key.endswith(".lora_A.weight")]:
        layer = transformer.get_submodule(key.removeprefix("transformer.").removesuffix(".lora_A.weight"))
        layer.weight.data += scale * matrices[key.replace("lora_A", "lora_B")] @ matrices[key]
    return transformer


def served(lora: Path, inputs: dict[str, torch.Tensor], monkeypatch) -> torch.Tensor:
    """Return what this service's own loader gives."""
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = CogVideoXPipeline.from_pretrained(MODEL, transformer=base(), **parts)
    loras = Loras(pipeline=pipeline, spec=SPECS["tiny-t2v"], report=lambda line: None)
    with loras.applied([Choice(address=parse(str(lora)), scale=1.0, alpha=None)]):
        return answer(pipeline.transformer, inputs)


def elsewhere(
    versions: dict[str, str],
    lora: Path,
    inputs: dict[str, torch.Tensor],
    folder: Path,
    *,
    strength: str = "1",
) -> torch.Tensor:
    """Return what other versions give, installed into `folder`; skip the test where no index is reachable."""
    pins = [f"{name}=={version}" for name, version in versions.items()]
    packages = folder / "packages"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--retries", "1"]
    done = subprocess.run([*install, "--target", packages, *pins], capture_output=True, text=True)
    if done.returncode and UNREACHABLE in done.stderr:
        pytest.skip("PyPI cannot be reached, so that no other versions can be installed")
    assert done.returncode == 0, done.stderr
    save_file(inputs, folder / "inputs.safetensors")
    command = [sys.executable, "-c", PROGRAM, MODEL, lora, folder / "inputs.safetensors"]
    command += [folder / "output.safetensors", strength, *pins]
    environment = os.environ | {"PYTHONPATH": str(packages)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "output.safetensors")["output"]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("versions", READS_ALPHA, ids=lambda each: "-".join(list(each.values())[:2]))
def test_other_versions_apply_a_trained_lora_as_this_service_does(
    versions, lora, inputs, tmp_path, monkeypatch
):
    expected = answer(merged(lora, ALPHA / RANK), inputs)
    assert not torch.allclose(expected, answer(merged(lora, 1.0), inputs), atol=0.05)
    assert not torch.allclose(expected, answer(base(), inputs), atol=0.05)
    assert close(served(lora, inputs, monkeypatch), expected)
    assert close(elsewhere(versions, lora, inputs, tmp_path), expected)


@pytest.mark.parametrize(("strength", "scale"), [("1", 1.0), (str(ALPHA / RANK), ALPHA / RANK)])
def test_diffusers_before_0_34_needs_alpha_over_rank_as_the_strength(strength, scale, lora, inputs, tmp_path):
    found = elsewhere(IGNORES_ALPHA, lora, inputs, tmp_path, strength=strength)
    assert close(found, answer(merged(lora, scale), inputs))
