"""Compiled blocks: the same values, one compilation for all, kept on disk, and no trace of a failure."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from lib.generation.generator import Generator
from lib.generation.warm_up import warm_up
from lib.memory.plan import plan_memory
from lib.pipelines import compilation
from lib.pipelines.attention import install
from lib.pipelines.compilation import compile_blocks, keep_compilations
from lib.pipelines.machine import Machine
from tests.lora_factory import WEIGHTS
from tests.lora_matrix import SPEC, latents, loaded
from tests.unit.pipelines.test_attention import build, run, with_lora
from tiny.evaluate import load_generator

ROOT = Path(__file__).resolve().parents[3]


class Counting:
    """A compiler that generates no code, counts what it is given, and fails on request."""

    def __init__(self) -> None:
        self.graphs = 0
        self.fails = False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        if self.fails:
            raise RuntimeError("no code for this")
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler() -> Counting:
    return Counting()


@pytest.fixture(autouse=True)
def forgotten():
    """Forget what the previous test compiled."""
    torch._dynamo.reset()


def test_all_blocks_share_one_compilation_for_each_kind_of_request(compiler):
    model = build("5b")
    install(model)
    expected = {batch: run(model, "5b", batch) for batch in (1, 2)}
    compile_blocks(model, backend=compiler)
    for batch in (2, 1, 2, 1):
        assert torch.equal(run(model, "5b", batch), expected[batch])
    assert compiler.graphs == 2


def test_a_lora_is_compiled_in_when_it_is_attached_and_left_out_when_it_is_off(compiler):
    model, stock = build("5b"), build("5b")
    install(model)
    base = run(model, "5b")
    compile_blocks(model, backend=compiler)
    assert torch.equal(run(model, "5b"), base)
    for each in (model, stock):
        with_lora(each, "to_q", "ff.net.0.proj")
    assert torch.equal(run(model, "5b"), run(stock, "5b"))
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    for enabled in (False, True, False, True):
        for layer in layers:
            layer.enable_adapters(enabled)
        assert torch.equal(run(model, "5b"), run(stock, "5b") if enabled else base)
    assert compiler.graphs == 3  # without a LoRA, with it, with one that is off


def test_a_failed_compilation_fails_only_its_call_and_leaves_nothing(compiler):
    model = build("5b")
    install(model)
    expected = run(model, "5b")
    compile_blocks(model, backend=compiler)
    compiler.fails = True
    with pytest.raises(Exception, match="no code for this"):
        run(model, "5b")
    compiler.fails = False
    assert torch.equal(run(model, "5b"), expected)
    compiler.fails = True
    with pytest.raises(Exception, match="no code for this"):
        run(model, "5b", 1)
    assert torch.equal(run(model, "5b"), expected)
    assert compiler.graphs == 1


def test_hooks_added_to_and_removed_from_a_block_take_effect(compiler):
    model = build("5b")
    install(model)
    expected = run(model, "5b")
    compile_blocks(model, backend=compiler)
    run(model, "5b")
    seen = []
    hook = model.transformer_blocks[1].register_forward_pre_hook(lambda *_: seen.append(1))
    assert torch.equal(run(model, "5b"), expected)
    hook.remove()
    run(model, "5b")
    assert (seen, compiler.graphs) == ([1], 1)


@pytest.mark.parametrize("model", ["tiny-t2v", "tiny-i2v"])
def test_after_the_warm_up_a_usual_request_compiles_nothing(compiler, model):
    generator = load_generator(WEIGHTS / model)
    compile_blocks(generator.pipeline.transformer, backend=compiler)
    warm_up(generator)
    assert compiler.graphs == 1
    if model == "tiny-t2v":
        usual = Generator(spec=SPEC, pipeline=generator.pipeline, report=lambda line: None)
        plain, _ = loaded("none", "plain", "resident")
        assert torch.equal(latents(usual, "exact"), latents(plain, "exact"))
        assert compiler.graphs == 1


@pytest.mark.parametrize(("frames", "latent_frames"), [(None, 3), (17, 5)])
def test_warming_up_takes_one_guided_step_of_the_length_that_fits(frames, latent_frames):
    generator = load_generator(WEIGHTS / "tiny-t2v")
    machine = Machine(device="cpu", free_bytes=None, dtype="float32")
    plan = plan_memory(generator.spec, WEIGHTS / "tiny-t2v", machine)
    generator.plan = replace(plan, frames=frames)
    lines, shapes = [], []
    generator.report = lines.append
    generator.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["hidden_states"].shape)), with_kwargs=True
    )
    warm_up(generator)
    assert [shape[:2] for shape in shapes] == [(2, latent_frames)]
    assert lines == []
    generator.report("reported again")
    assert lines == ["reported again"]


def test_compilations_are_kept_in_the_cache_unless_the_user_says_where(monkeypatch, tmp_path):
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(compilation.CACHE_VARIABLE, "/their/own")
    keep_compilations()
    assert os.environ[compilation.CACHE_VARIABLE] == "/their/own" and not (tmp_path / "cache").exists()
    for unset in (None, default_cache_dir()):  # torch sets its default when it is imported
        if unset is None:
            monkeypatch.delenv(compilation.CACHE_VARIABLE)
        else:
            monkeypatch.setenv(compilation.CACHE_VARIABLE, unset)
        keep_compilations()
        assert os.environ[compilation.CACHE_VARIABLE] == str(tmp_path / "cache" / "compiled")
    assert (tmp_path / "cache" / "compiled").stat().st_mode & 0o777 == 0o700


COMPILE = """
import json
from torch._dynamo.utils import counters
from lib.pipelines.attention import install
from lib.pipelines.compilation import compile_blocks, keep_compilations
keep_compilations()
from tests.unit.pipelines.test_attention import build, run
model = build("5b")
install(model)
expected = run(model, "5b")
compile_blocks(model)
difference = float((run(model, "5b") - expected).abs().max())
print(json.dumps([difference, counters["inductor"]["fxgraph_cache_hit"]]))
"""


@pytest.mark.slow
def test_generated_code_computes_the_same_to_rounding_and_is_reused_by_the_next_process(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != compilation.CACHE_VARIABLE}
    environment |= {"PYTHONPATH": str(ROOT), "COGVIDEOX_CACHE": str(tmp_path)}
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", COMPILE]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    (first, made), (second, kept) = found
    assert (made, kept) == (0, 1)
    assert first == second < 1e-5
