"""Compiled blocks in two processes that share a forward pass, by branch and by sequence."""

import pytest

from lib.distributed.layout import Layout
from lib.distributed.process_group import ProcessGroup
from lib.pipelines.attention import install
from lib.pipelines.compilation import compile_blocks
from tests.parallel_factory import in_processes
from tests.unit.pipelines.test_attention import build, run
from tests.unit.pipelines.test_compilation import Counting

LAYOUTS = 3 * [None, Layout(branches=2), Layout(sequence=2)]


def distances_and_graphs(group: ProcessGroup) -> list[tuple[float, int]]:
    """For each layout: the distance from one uncompiled process, and how many graphs were compiled so far."""
    model = build("5b")
    install(model)
    alone = run(model, "5b")
    compiler = Counting()
    compile_blocks(model, backend=compiler)
    found = []
    for layout in LAYOUTS:
        if layout is None:
            result = run(model, "5b")
        else:
            with group.shared_forward(model, layout):
                result = run(model, "5b")
        found.append((float((result - alone).abs().max()), compiler.graphs))
    return found


@pytest.mark.slow
def test_two_processes_match_one_and_stop_compiling_after_each_kind_was_seen(tmp_path):
    for found in in_processes(2, tmp_path, distances_and_graphs):
        assert max(distance for distance, _ in found) < 1e-5
        graphs = [count for _, count in found]
        assert graphs[0] < graphs[1] < graphs[2]
        assert graphs[5] == graphs[-1]
