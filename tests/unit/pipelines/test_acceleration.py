"""What a server's variables ask for, what this machine can do of it, and what is said where it cannot."""

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from lib import optional
from lib.errors import UserError
from lib.memory.model import MemoryModel
from lib.memory.plan import MemoryPlan
from lib.models.specs import SPECS
from lib.pipelines import acceleration, compilation
from lib.pipelines.acceleration import (
    KERNELS,
    Acceleration,
    check_plan,
    hasten,
    settle,
    settle_attention,
    settle_compile,
    settle_quantization,
)
from lib.pipelines.machine import Machine
from lib.pipelines.quantization import QUANTIZATIONS
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


def planned(offload: str) -> MemoryPlan:
    spec = SPECS["cogvideox-5b"]
    gpu = Machine(device="cuda", free_bytes=0, dtype="bfloat16")
    memory = MemoryModel.of(spec, None, gpu)
    return MemoryPlan(
        offload=offload, tiling=True, need=0, room=None, memory=memory, spec=spec, reason="a small card"
    )


def test_without_variables_a_cpu_computes_plainly():
    settings = settle(machine(), {})
    assert settings == Acceleration()
    assert str(settings) == "attention native"
    assert settings.facts() == {"attention": "native", "compiled": False, "quantization": "none"}


def test_the_settings_are_told_in_one_line_and_weights_without_how_they_are_computed():
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
@pytest.mark.parametrize("asked", ["", "auto"])
def test_auto_takes_the_fastest_exact_kernel_that_is_there(
    installed, asked, capability, dtype, packages, chosen
):
    installed |= packages
    assert settle_attention(asked, capability, dtype) == chosen


def test_a_kernel_that_is_there_can_be_asked_for(installed):
    installed |= {"flash_attn", "flash_attn_interface", "sageattention"}
    for asked in KERNELS:
        assert settle_attention(asked, HOPPER, "bfloat16") == asked
    assert settle_attention("native", CPU, "float32") == "native"


@pytest.mark.parametrize(
    ("asked", "capability", "dtype", "message"),
    [
        (
            "fast",
            HOPPER,
            "bfloat16",
            "COGVIDEOX_ATTENTION=fast is unknown; allowed are auto, native, cudnn, flash, flash3, sage.",
        ),
        (
            "cudnn",
            CPU,
            "float32",
            "COGVIDEOX_ATTENTION=cudnn needs a GPU of compute capability 8.0 or more; this is a CPU. "
            "auto, or leaving it out, chooses what it can do.",
        ),
        (
            "flash3",
            BLACKWELL,
            "bfloat16",
            "COGVIDEOX_ATTENTION=flash3 needs a GPU of compute capability 9.0 exactly; this one has 10.0. "
            "auto, or leaving it out, chooses what it can do.",
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
def test_a_kernel_that_is_not_possible_is_refused_with_its_reason(
    installed, asked, capability, dtype, message
):
    with pytest.raises(UserError) as refused:
        settle_attention(asked, capability, dtype)
    assert str(refused.value) == message


def test_a_kernel_that_diffusers_cannot_share_among_gpus_is_for_one_of_them(installed):
    sharing = {AttentionBackendName(each) for each in _AttentionBackendRegistry._supports_context_parallel}
    for name, kernel in KERNELS.items():
        assert kernel.shares == (AttentionBackendName(kernel.backend) in sharing), name
    installed.add("flash_attn_interface")
    assert settle_attention("auto", HOPPER, "bfloat16", shared=True) == "cudnn"
    with pytest.raises(UserError) as refused:
        settle_attention("flash3", HOPPER, "bfloat16", shared=True)
    assert str(refused.value) == (
        "COGVIDEOX_ATTENTION=flash3 cannot share a clip among GPUs: choose cudnn, or set "
        "COGVIDEOX_PARALLEL=off."
    )


def test_a_chosen_kernel_is_this_transformers_alone():
    model, other = build("5b"), build("5b")
    before = _AttentionBackendRegistry._active_backend
    for each in (model, other):
        install(each)
    hasten(model, Acceleration())
    kernels = {processor._attention_backend for processor in model.attn_processors.values()}
    assert [kernel.value for kernel in kernels] == ["native"]
    assert {processor._attention_backend for processor in other.attn_processors.values()} == {None}
    assert _AttentionBackendRegistry._active_backend == before
    assert torch.equal(run(model, "5b"), run(other, "5b"))


@pytest.mark.parametrize(("asked", "capability"), [("int8", CPU), ("fp8", AMPERE), ("fp8-dynamic", ADA)])
def test_weights_are_quantised_where_the_device_and_torchao_can(installed, asked, capability):
    with pytest.raises(UserError) as refused:
        settle_quantization(asked, capability)
    assert str(refused.value) == (
        f"COGVIDEOX_QUANTIZATION={asked} needs torchao, which is not installed: pip install torchao, or add "
        "a line with it to requirements.txt for an image."
    )
    installed.add("torchao")
    assert settle_quantization(asked, capability) == asked
    assert settle_quantization("", capability) == settle_quantization("none", capability) == "none"


@pytest.mark.parametrize(
    ("asked", "capability", "message"),
    [
        (
            "8bit",
            HOPPER,
            "COGVIDEOX_QUANTIZATION=8bit is unknown; allowed are none, int8, int8-dynamic, fp8, fp8-dynamic.",
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
def test_a_quantisation_that_is_not_possible_is_refused_with_its_reason(
    installed, asked, capability, message
):
    installed.add("torchao")
    with pytest.raises(UserError) as refused:
        settle_quantization(asked, capability)
    assert str(refused.value) == message


def test_compiling_is_on_or_off():
    assert [settle_compile(asked, "cpu") for asked in ("", "0")] == [False, False]
    with pytest.raises(UserError, match=r"^COGVIDEOX_COMPILE=yes is unknown; allowed are 0 and 1\.$"):
        settle_compile("yes", "cpu")


def test_compiling_without_a_compiler_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(UserError) as refused:
        settle(machine(), {"COGVIDEOX_COMPILE": "1"})
    assert str(refused.value) == (
        "COGVIDEOX_COMPILE=1 needs a C++ compiler, and none was found: install one (apt-get install g++), or "
        "leave it out."
    )


def test_compiling_without_pythons_headers_or_triton_is_refused(monkeypatch, installed, tmp_path):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name)
    monkeypatch.setattr(compilation.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match="Python's own headers, and they were not found: install them"):
        settle_compile("1", "cpu")
    (tmp_path / "Python.h").touch()
    assert settle_compile("1", "cpu") is True
    with pytest.raises(UserError, match="needs triton, which comes with torch for CUDA"):
        settle_compile("1", "cuda")
    installed.add("triton")
    assert settle_compile("1", "cuda") is True


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({"compiled": True}, "COGVIDEOX_COMPILE=1", "it brings the layers of a compiled block one by one"),
        ({"quantization": "int8"}, "COGVIDEOX_QUANTIZATION=int8", "it cannot move them"),
    ],
)
def test_the_plan_that_moves_single_layers_goes_with_plain_ones_alone(settings, name, reason):
    for offload in ("resident", "text", "model", "group"):
        check_plan(Acceleration(**settings), planned(offload))
    check_plan(acceleration.PLAIN, planned("sequential"))
    with pytest.raises(UserError) as refused:
        check_plan(Acceleration(**settings), planned("sequential"))
    assert str(refused.value) == (
        f"{name} does not go with the memory plan sequential (a small card): {reason}. Leave it out, or set "
        "COGVIDEOX_OFFLOAD=group."
    )


def test_the_docs_name_every_variable_and_value():
    page, variables, cog = (
        (ROOT / name).read_text() for name in ("docs/acceleration.md", "docs/models.md", "cog.yaml")
    )
    for variable, values in {
        "COGVIDEOX_ATTENTION": ["auto", *KERNELS],
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
