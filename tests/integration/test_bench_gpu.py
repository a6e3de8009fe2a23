"""The serving benchmark for GPUs, with small models on a CPU: released shapes, against plain diffusers."""

import json
import os
import subprocess
import sys

import pytest

from lib.serving.registry import PROJECT

pytestmark = pytest.mark.slow


def test_the_benchmark_writes_models_of_its_own_and_compares_the_service_with_diffusers(tmp_path):
    figures, temporary = tmp_path / "figures.json", tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-P", "-m", "bench.gpu", "--try-out", "--steps", "2", "--layers", "1"]
    command += ["--text-layers", "1", "--variant", "exact", "--json", str(figures)]
    command += ["--model", "cogvideox-5b-i2v"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    (variants,) = found["models"].values()
    assert list(variants) == ["plain", "exact"]
    assert all(each["clip"] > each["denoising"] > 0 for each in variants.values())
    assert done.stdout.count("| exact |") == 1
    assert list(temporary.glob("tmp*")) == []
