"""What a server's variables ask for, what this machine can do of it, and the message where it cannot."""

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from lib import optional
from lib.errors import UserError
from lib.pipelines import acceleration, compilation
from lib.pipelines.acceleration import (
    BACKENDS,
    Acceleration,
    check_offload,
    resolve,
    resolve_attention,
    resolve_compile,
    resolve_quantization,
    set_attention_backend,
)
from lib.pipelines.machine import Machine
from lib.pipelines.quantization import QUANTIZATIONS
from lib.settings import current
from tests.unit.pipelines.test_attention import build, install, run

ROOT = Path(__file__).resolve().parents[3]
AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)
CPU = None


@pytest.fixture
def installed(monkeypatch):
    """Chooses which optional packages are there."""
    packages: set[str] = set()
    monkeypatch.setattr(optional, "find_spec", lambda name: name if name in packages else None)
    return packages


def machine() -> Machine:
    return Machine(device="cpu", free_bytes=0, dtype="float32")


def test_without_variables_a_cpu_computes_plainly():
    settings = resolve(machine(), current({}))
    assert settings == Acceleration()
    assert str(settings) == "attention native"
    assert settings.facts() == {"attention": "native", "compiled": False, "quantization": "none"}


def test_the_settings_fit_in_one_line_and_weights_name_only_how_they_are_stored():
    settings = Acceleration(attention="cudnn", compiled=True, quantization="fp8-dynamic")
    assert str(settings) == "attention cudnn, compiled, weights in fp8-dynamic"
    stored = [Acceleration(quantization=kind).weights for kind in QUANTIZATIONS]
    assert stored == ["none", "int8", "int8", "fp8", "fp8"]


@pytest.mark.parametrize(
    ("capability", "dtype", "packages", "chosen"),
    [
        (CPU, "float32", {"flash_attn_interface"}, "native"),
        (AMPERE, "bfloat16", {"flash_attn", "sageattention"}, "native"),
        (ADA, "float16", {"flash_attn_interface"}, "native"),
        (HOPPER, "bfloat16", set(), "cudnn"),
        (HOPPER, "bfloat16", {"flash_attn_interface", "sageattention"}, "flash3"),
        (HOPPER, "float32", {"flash_attn_interface"}, "native"),
        (BLACKWELL, "bfloat16", {"flash_attn_interface", "sageattention"}, "cudnn"),
    ],
)
def test_auto_takes_the_fastest_exact_backend_that_is_installed(
    installed, capability, dtype, packages, chosen
):
    installed |= packages
    assert resolve_attention("auto", capability, dtype) == chosen


def test_every_installed_backend_can_be_requested(installed):
    installed |= {"flash_attn", "flash_attn_interface", "sageattention"}
    for requested in BACKENDS:
        assert resolve_attention(requested, HOPPER, "bfloat16") == requested
    assert resolve_attention("native", CPU, "float32") == "native"


@pytest.mark.parametrize(
    ("requested", "capability", "dtype", "message"),
    [
        (
            "cudnn",
            CPU,
            "float32",
            "COGVIDEOX_ATTENTION=cudnn needs a GPU of compute capability 8.0 or more; this is a CPU. "
            "Set auto, or leave it out, to use what this machine can do.",
        ),
        (
            "flash3",
            BLACKWELL,
            "bfloat16",
            "COGVIDEOX_ATTENTION=flash3 needs a GPU of compute capability 9.0 exactly; this one has 10.0. "
            "Set auto, or leave it out, to use what this machine can do.",
        ),
        (
            "sage",
            ADA,
            "float32",
            "COGVIDEOX_ATTENTION=sage computes in 16 bits only, and this model runs in float32.",
        ),
        (
            "sage",
            ADA,
            "float16",
            "COGVIDEOX_ATTENTION=sage needs sageattention, which is not installed: "
            "pip install sageattention, or add a line with it to requirements.txt for an image.",
        ),
        (
            "flash",
            AMPERE,
            "bfloat16",
            "COGVIDEOX_ATTENTION=flash needs flash-attn, which is not installed: pip install flash-attn, "
            "or add a line with it to requirements.txt for an image.",
        ),
        (
            "flash3",
            HOPPER,
            "bfloat16",
            "COGVIDEOX_ATTENTION=flash3 needs FlashAttention 3 (flash_attn_interface), which is not "
            "installed: it is built from the hopper folder of FlashAttention's repository.",
        ),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_the_reason(
    installed, requested, capability, dtype, message
):
    with pytest.raises(UserError) as refused:
        resolve_attention(requested, capability, dtype)
    assert str(refused.value) == message


def test_a_backend_without_context_parallelism_is_refused_where_gpus_share_clips(installed):
    sharing = {AttentionBackendName(each) for each in _AttentionBackendRegistry._supports_context_parallel}
    for name, backend in BACKENDS.items():
        assert backend.context_parallel == (AttentionBackendName(backend.diffusers_name) in sharing), name
    installed.add("flash_attn_interface")
    assert resolve_attention("auto", HOPPER, "bfloat16", shared=True) == "cudnn"
    with pytest.raises(UserError) as refused:
        resolve_attention("flash3", HOPPER, "bfloat16", shared=True)
    assert str(refused.value) == (
        "COGVIDEOX_ATTENTION=flash3 cannot share a clip among GPUs: choose cudnn, or set "
        "COGVIDEOX_PARALLEL=off."
    )


def test_a_backend_is_set_for_this_transformer_only():
    model, other = build("5b"), build("5b")
    before = _AttentionBackendRegistry._active_backend
    for each in (model, other):
        install(each)
    set_attention_backend(model, "native")
    backends = {processor._attention_backend for processor in model.attn_processors.values()}
    assert [backend.value for backend in backends] == ["native"]
    assert {processor._attention_backend for processor in other.attn_processors.values()} == {None}
    assert _AttentionBackendRegistry._active_backend == before
    assert torch.equal(run(model, "5b"), run(other, "5b"))


@pytest.mark.parametrize(("requested", "capability"), [("int8", CPU), ("fp8", AMPERE), ("fp8-dynamic", ADA)])
def test_quantization_needs_torchao_and_a_device_that_can(installed, requested, capability):
    with pytest.raises(UserError) as refused:
        resolve_quantization(requested, capability)
    assert str(refused.value) == (
        f"COGVIDEOX_QUANTIZATION={requested} needs torchao, which is not installed: pip install torchao, "
        "or add a line with it to requirements.txt for an image."
    )
    installed.add("torchao")
    assert resolve_quantization(requested, capability) == requested
    assert resolve_quantization(None, capability) == resolve_quantization("none", capability) == "none"


@pytest.mark.parametrize(
    ("requested", "capability", "message"),
    [
        (
            "int4",
            HOPPER,
            "COGVIDEOX_QUANTIZATION=int4 is for captions only; for video use none, int8, int8-dynamic, fp8, "
            "fp8-dynamic.",
        ),
        (
            "fp8-dynamic",
            AMPERE,
            "COGVIDEOX_QUANTIZATION=fp8-dynamic needs a GPU of compute capability 8.9 or more; this one has "
            "8.0. fp8 stores weights the same way and computes as before; int8-dynamic computes in 8 bits.",
        ),
        (
            "fp8-dynamic",
            CPU,
            "COGVIDEOX_QUANTIZATION=fp8-dynamic needs a GPU of compute capability 8.9 or more; this is a "
            "CPU. fp8 stores weights the same way and computes as before; int8-dynamic computes in 8 bits.",
        ),
    ],
)
def test_a_quantization_that_cannot_run_is_refused_with_the_reason(installed, requested, capability, message):
    installed.add("torchao")
    with pytest.raises(UserError) as refused:
        resolve_quantization(requested, capability)
    assert str(refused.value) == message


def test_nothing_is_needed_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    assert resolve_compile(False, "cpu") is False


def test_compiling_without_a_compiler_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(UserError) as refused:
        resolve(machine(), current({"COGVIDEOX_COMPILE": "1"}))
    assert str(refused.value) == (
        "COGVIDEOX_COMPILE=1 needs a C++ compiler, and none was found: install one (apt-get install g++), or "
        "leave it out."
    )


def test_compiling_without_pythons_headers_or_triton_is_refused(monkeypatch, installed, tmp_path):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name)
    monkeypatch.setattr(compilation.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match="Python's own headers, and they were not found: install them"):
        resolve_compile(True, "cpu")
    (tmp_path / "Python.h").touch()
    assert resolve_compile(True, "cpu") is True
    with pytest.raises(UserError, match="needs triton, which comes with torch for CUDA"):
        resolve_compile(True, "cuda")
    installed.add("triton")
    assert resolve_compile(True, "cuda") is True


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({"compiled": True}, "COGVIDEOX_COMPILE=1", "it loads the layers of a compiled block one by one"),
        ({"quantization": "int8"}, "COGVIDEOX_QUANTIZATION=int8", "it cannot move quantized weights"),
    ],
)
def test_the_plan_sequential_allows_neither_compilation_nor_quantization(settings, name, reason):
    for offload in ("resident", "text", "model", "group"):
        check_offload(Acceleration(**settings), offload, "a small card")
    check_offload(acceleration.PLAIN, "sequential", "a small card")
    with pytest.raises(UserError) as refused:
        check_offload(Acceleration(**settings), "sequential", "a small card")
    assert str(refused.value) == (
        f"{name} cannot be combined with the memory plan sequential (a small card): {reason}. Leave it out, "
        "or set COGVIDEOX_OFFLOAD=group."
    )


def test_the_docs_name_every_variable_and_value():
    page, variables, cog = (
        (ROOT / name).read_text() for name in ("docs/acceleration.md", "docs/models.md", "cog.yaml")
    )
    for variable, values in {
        "COGVIDEOX_ATTENTION": ["auto", *BACKENDS],
        "COGVIDEOX_COMPILE": ["1"],
        "COGVIDEOX_QUANTIZATION": QUANTIZATIONS[1:],
    }.items():
        [row] = [
            line
            for line in variables.splitlines()
            if line.startswith(f"| `{variable}`") and "[" in line and "acceleration.md" in line
        ]
        assert f"| `{variable}` |" in page
        for value in values:
            assert f"`{value}`" in row and f"`{value}`" in page, value
    pinned = next(
        line for line in (ROOT / "requirements-extras.txt").read_text().splitlines() if "torchao" in line
    )
    assert f"pip install {pinned}`" in page
    for package in ("g++", "python3-dev"):
        assert f"- {package}" in page and package in cog
