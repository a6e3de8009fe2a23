"""The training benchmark for GPUs, with a small model on a CPU: the trainer accepts its base."""

import os
import re
import subprocess
import sys

import pytest

from lib.serving.registry import PROJECT

pytestmark = pytest.mark.slow


def test_the_benchmark_writes_a_base_of_its_own_and_trains_it(tmp_path):
    command = [sys.executable, "-P", "-m", "bench.training", "--try-out", "--steps", "3", "--layers", "1"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"CPU, a small shape, base auto, 1 layers: \d+\.\d\d s a step\n", done.stdout)
    assert list(tmp_path.glob("tmp*")) == []
