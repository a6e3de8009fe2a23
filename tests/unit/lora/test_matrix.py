"""A LoRA gives diffusers' own latents in every acceleration and offload mode, and the base's when removed."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests import lora_matrix
from tests.lora_matrix import OFFLOADS, QUANTIZED, SPEEDS, lora_file, outcome

ROOT = Path(__file__).resolve().parents[3]
WAYS = list(product(("plain", "compiled"), OFFLOADS))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return lora_file(tmp_path_factory.mktemp("lora"))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def cpu_as_gpu():
    """Undo what lora_matrix changes to use the CPU as the GPU."""
    offload = lora_matrix.DiffusionPipeline.enable_model_cpu_offload
    yield
    lora_matrix.DiffusionPipeline.enable_model_cpu_offload = offload
    lora_matrix.loaded.cache_clear()
    lora_matrix.expected.cache_clear()


@pytest.mark.parametrize(("computed", "offload"), WAYS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_latents_are_those_of_plain_diffusers_and_unloading_restores_the_base(file, computed, offload, speed):
    found = outcome("none", computed, offload, speed, file)
    changes = found.pop("lora changes")
    assert found == {"base": 0, "lora": 0, "after": 0, "unloaded": 0}
    assert changes > 0.01


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> dict[str, dict[str, float]]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(sys.prefix) / 'extras'}"}
    environment |= {"COGVIDEOX_CACHE": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "-m", "tests.lora_matrix", str(tmp_path_factory.mktemp("lora"))]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_latents_on_quantized_weights_are_those_of_diffusers_with_the_same_weights(quantized, kind):
    ways = {way: found for way, found in quantized.items() if way.split()[0] == kind}
    assert len(ways) == len(QUANTIZED[kind])
    for way, found in ways.items():
        changes = found.pop("lora changes")
        assert found == {"base": 0, "lora": 0, "after": 0, "unloaded": 0}, way
        assert changes > 0.01
