"""Quantized loading with the real bitsandbytes, in a process with the optional packages of .venv/extras."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

MEASURE = """
import json, sys
import torch
from pathlib import Path
from lib.caption.checkpoint import load_model
from tiny.caption_checkpoint import save_model
from lib.caption.model import CaptionModel
from lib.caption.inputs import build_prompt
from tiny.captioner import caption_config

folder = Path(sys.argv[1])
torch.manual_seed(1)
save_model(CaptionModel(caption_config(100)), folder)
frames = torch.randn(3, 3, 48, 48)
prompt = build_prompt("what", frames=3, template="chat", tokens_per_frame=11, bos=0, pad=2,
                      encode=lambda text: [5 + len(text)])

def figures(quantization):
    model = load_model(folder, dtype=torch.float32, quantization=quantization)
    with torch.inference_mode():
        seen = model.see(frames)
        logits = model.language(**model.embed([prompt], [frames]), use_cache=False).logits[0, -1]
    kinds = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            part = "output" if name.endswith("lm_head") else name.split(".")[0]
            kinds.setdefault(part, set()).add(str(module.weight.dtype))
    return seen, logits, {part: sorted(found) for part, found in kinds.items()}

seen, logits, _ = figures("none")
report = {}
for quantization in ("int8", "int4"):
    small_seen, small_logits, kinds = figures(quantization)
    report[quantization] = {
        "kinds": kinds,
        "vision": float((small_seen - seen).norm() / seen.norm()),
        "logits": float(torch.cosine_similarity(small_logits, logits, dim=0)),
    }
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    extras = Path(sys.prefix) / "extras"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{extras}"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path_factory.mktemp("model"))]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_int8_quantizes_language_model_and_vision_tower_but_not_the_output_layer(report):
    assert report["int8"]["kinds"] == {
        "vision": ["torch.int8"],
        "language": ["torch.int8"],
        "output": ["torch.float32"],
    }
    assert report["int8"]["vision"] < 0.1 and report["int8"]["logits"] > 0.99


def test_int4_quantizes_the_language_model_alone(report):
    assert report["int4"]["kinds"] == {
        "vision": ["torch.float32"],
        "language": ["torch.uint8"],
        "output": ["torch.float32"],
    }
    assert report["int4"]["vision"] == 0 and report["int4"]["logits"] > 0.9
