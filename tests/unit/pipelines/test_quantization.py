"""Quantized weights with the real torchao, which only a process with .venv/extras on its path can import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.pipelines.quantization import QUANTIZATIONS

ROOT = Path(__file__).resolve().parents[3]
FULL = 4
"""Bytes of a weight in float32."""

MEASURE = """
import json, weakref
from pathlib import Path
from types import SimpleNamespace
from lib.pipelines.acceleration import Acceleration
from lib.pipelines.machine import Machine
from lib.models.specs import SPECS
from lib.pipelines.load import load_pipeline
from lib.pipelines import quantization
from lib.pipelines.quantization import QUANTIZATIONS
import torch
from lib.generation.generator import Generator
from lib.generation.request import build_request
from tests.unit.pipelines.test_attention import build

from tiny.evaluate import DEFAULTS

spec, folder = SPECS["tiny-t2v"], Path("weights/tiny-t2v")
machine = Machine(device="cpu", free_bytes=0, dtype="float32")
request = build_request(
    spec, **DEFAULTS | {"prompt": "a green square moves up", "seed": 7, "num_inference_steps": 4}
)

def kept(tensor):
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return sum(kept(getattr(tensor, name)) for name in names) or tensor.numel() * tensor.itemsize

def figures(kind):
    pipeline = load_pipeline(spec, folder, machine, acceleration=Acceleration(quantization=kind))
    frames = Generator(spec=spec, pipeline=pipeline, report=lambda line: None).frames(request)
    shares = {}
    for part in ("transformer", "text_encoder"):
        for name, module in getattr(pipeline, part).named_modules():
            if isinstance(module, torch.nn.Linear):
                block = "block" in name
                place = "around" if not block else "modulation" if ".norm" in name else part
                shares.setdefault(place, set()).add(type(module.weight).__name__)
    weights = [layer.weight for layer in pipeline.transformer.transformer_blocks.modules()
               if isinstance(layer, torch.nn.Linear)]
    return frames.astype(float), {
        "kinds": {place: sorted(kinds) for place, kinds in shares.items()},
        "bytes": sum(map(kept, weights)) / sum(weight.numel() for weight in weights),
    }

exact, plain = figures("none")
report = {"none": plain}
for kind in QUANTIZATIONS[1:-1]:
    frames, report[kind] = figures(kind)
    error = float(((frames - exact) ** 2).mean())
    report[kind]["decibels"] = float(10 * torch.log10(torch.tensor(255**2 / error)))

model = build("5b")
layers = [layer for layer in model.transformer_blocks.modules() if isinstance(layer, torch.nn.Linear)]
originals = [weakref.ref(layer.weight) for layer in layers]
report["originals"] = []

def counted(check):
    def counting(module, name):
        if check(module, name):
            report["originals"].append(sum(original() is not None for original in originals))
        return check(module, name)
    return counting

for name in ("_is_modulation", "_is_projection"):
    setattr(quantization, name, counted(getattr(quantization, name)))
quantization.quantize_pipeline(SimpleNamespace(transformer=model, text_encoder=None), "int8", device="cpu")
report["originals"].append(sum(original() is not None for original in originals))
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> subprocess.CompletedProcess:
    extras = tmp_path_factory.mktemp("extras")
    for found in (Path(sys.prefix) / "extras").glob("torchao*"):
        (extras / found.name).symlink_to(found)  # without the other extras, which have warnings of their own
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{extras}"}
    command = [sys.executable, "-c", MEASURE]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    return ran


@pytest.fixture(scope="module")
def report(measured) -> dict:
    return json.loads(measured.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "tensor"), [("int8", "Int8Tensor"), ("int8-dynamic", "Int8Tensor"), ("fp8", "Float8Tensor")]
)
def test_only_the_layers_of_the_blocks_are_quantized(report, kind, tensor):
    assert report[kind]["kinds"] == {
        "transformer": [tensor],
        "modulation": [tensor],
        "text_encoder": [tensor],
        "around": ["Parameter"],
    }
    assert report["none"]["bytes"] == FULL
    assert 1 < report[kind]["bytes"] < 1.1  # with a scale for each row


@pytest.mark.parametrize(("kind", "least"), [("int8", 40), ("int8-dynamic", 30), ("fp8", 30)])
def test_frames_stay_close_to_those_of_full_weights(report, kind, least):
    assert report[kind]["decibels"] > least


def test_each_layers_weights_are_freed_before_the_next_is_quantized(report):
    found = report["originals"]
    assert found == list(range(len(found) - 1, -1, -1))


def test_torchao_and_peft_print_no_warnings(measured):
    assert measured.stderr == ""


def test_only_the_kind_that_needs_a_gpu_is_not_tried_here(report):
    assert set(QUANTIZATIONS) - set(report) == {"fp8-dynamic"}
