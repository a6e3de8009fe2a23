"""A start in a process of its own: what it opens, and what it does not import."""

import os
import subprocess
import sys

import pytest

from lib.serving.registry import PROJECT

OFFLINE = """
import socket
def forbidden(*arguments, **options):
    raise AssertionError(f"the network was touched: {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = forbidden
from lib.predictors.start import start_video
from lib.predictors.model import Metrics
inputs = dict(prompt="a red circle", negative_prompt="", num_inference_steps=1, guidance_scale=6.0,
              num_frames=None, width=None, height=None, fps=None, seed=1, use_dynamic_cfg=False,
              scheduler="default", output_format="mp4")
metrics = Metrics()
path = start_video("t2v")(metrics, **inputs)
print(path.stat().st_size, metrics["model"])
"""


def test_setup_and_a_request_from_a_complete_folder_open_no_socket(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"PYTHONPATH": str(PROJECT), "COGVIDEOX_MODEL": "", "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().endswith("tiny-t2v")
    assert "embedded" in ran.stdout
    assert list(tmp_path.glob("cogvideox-*")) == []


MODULES = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""
COMMANDS = [
    f"lib.commands.{name}" for name in ("predict", "serve", "schema", "caption", "convert", "parallel")
]


@pytest.mark.parametrize(
    "modules",
    [
        [*COMMANDS, "training.__main__", "lib.serving.host"],
        [path.stem for path in PROJECT.glob("predict_*.py")],
    ],
    ids=["commands", "signatures"],
)
def test_commands_and_signatures_are_imported_without_torch(modules):
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", MODULES, *modules]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "[]\n", ran.stderr


REFUSED = """
import sys
from lib.errors import UserError
from lib.predictors.start import start_caption, start_video
for start in (start_caption, lambda: start_video("t2v")):
    try:
        start()
    except UserError:
        print("refused", "torch" in sys.modules or "diffusers" in sys.modules)
"""


def test_a_wrong_model_is_refused_without_importing_torch(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "COGVIDEOX_MODEL": "tiny-i2v"}
    ran = subprocess.run(
        [sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "refused False\nrefused False\n", ran.stderr
