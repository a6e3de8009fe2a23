"""Compiled blocks in two processes that share a forward pass, by branch and by sequence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

MEMBER = """
import json, sys
from pathlib import Path
import torch._dynamo
from lib.pipelines.attention import install
from lib.pipelines.compilation import compile_blocks
from lib.distributed.process_group import ProcessGroup
from lib.distributed.layout import Layout
from tests.unit.pipelines.test_attention import build, run
from tests.unit.pipelines.test_compilation import Counting

model = build("5b")
install(model)
alone = run(model, "5b")
compiler = Counting()
compile_blocks(model, backend=compiler)
group = ProcessGroup.join(rank=int(sys.argv[1]), count=2, device="cpu", store=Path(sys.argv[2]), seconds=300)
found = []
for layout in 3 * [None, Layout(branches=2, sequence=1), Layout(branches=1, sequence=2)]:
    if layout is None:
        result = run(model, "5b")
    else:
        with group.shared_forward(model, layout):
            result = run(model, "5b")
    found.append((float((result - alone).abs().max()), compiler.graphs))
group.close()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_match_one_and_stop_compiling_after_each_kind_was_seen(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        printed, _ = process.communicate(timeout=300)
        found = json.loads(printed.splitlines()[-1])
        assert max(distance for distance, _ in found) < 1e-5
        graphs = [count for _, count in found]
        assert graphs[0] < graphs[1] < graphs[2]
        assert graphs[5] == graphs[-1]
