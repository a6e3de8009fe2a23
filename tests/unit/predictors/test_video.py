import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.predictors.video import VideoPredictor, thinned

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        ("i2v", "cogvideox-2b", "cogvideox-2b is a model for text-to-video"),
        ("t2v", "cogvideox1.5-5b-i2v", "this predictor does text-to-video"),
        ("t2v", str(ROOT / "weights" / "tiny-i2v"), "tiny-i2v is a model for image-to-video"),
        ("t2v", "cogvlm2-caption", "cogvlm2-caption is a model for captioning"),
        ("t2v", "no-such-model", "no-such-model"),
    ],
)
def test_a_model_that_cannot_do_the_task_is_refused_before_any_download(monkeypatch, task, model, message):
    def forbidden(*arguments, **options):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setenv("COGVIDEOX_MODEL", model)
    with pytest.raises(UserError, match=message):
        VideoPredictor.start(task=task)


OFFLINE = """
import socket, sys
def forbidden(*arguments, **options):
    raise AssertionError(f"the network was touched: {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = forbidden
from lib.predictors.video import VideoPredictor
class Metrics(dict):
    record_metric = dict.__setitem__
inputs = dict(prompt="a red circle", negative_prompt="", num_inference_steps=1, guidance_scale=6.0,
              num_frames=None, width=None, height=None, fps=None, seed=1, use_dynamic_cfg=False,
              scheduler="default", output_format="mp4")
metrics = Metrics()
path = VideoPredictor.start(task="t2v")(metrics, **inputs)
print(path.stat().st_size, metrics["model"])
"""


def test_setup_and_a_request_from_a_whole_folder_open_no_socket(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"PYTHONPATH": str(ROOT), "COGVIDEOX_MODEL": "", "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().endswith("tiny-t2v")
    assert "embedded" in ran.stdout
    assert list(tmp_path.glob("cogvideox-*")) == []


def test_progress_in_quick_steps_is_thinned_but_for_its_last_line_and_for_what_is_no_progress(monkeypatch):
    clock, lines = iter([1.0, 1.05, 1.2, 1.21, 1.22]), []
    monkeypatch.setattr("lib.predictors.video.time.monotonic", lambda: next(clock))
    report = thinned(lines.append)
    for line in ("a note", *(f"progress: denoising {step}/5" for step in range(1, 6)), "another"):
        report(line)
    kept = [f"progress: denoising {step}/5" for step in (1, 3, 5)]
    assert lines == ["a note", *kept, "another"]
