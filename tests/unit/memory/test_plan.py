import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.memory.model import GIB, OFFLOADS, MemoryModel, usual_clip
from lib.memory.plan import USABLE, choose_plan, needed
from lib.memory.stages import Clip
from lib.memory.table import markdown, rows
from lib.models.specs import SPECS
from lib.pipelines.machine import Machine, free_system_bytes

ROOT = Path(__file__).resolve().parents[3]
CPU = Machine(device="cpu", free_bytes=None, dtype="float32")


def gpu(gibibytes: float, system: float | None = None) -> Machine:
    system_bytes = None if system is None else int(system * GIB)
    return Machine(
        device="cuda", free_bytes=int(gibibytes * GIB), dtype="bfloat16", system_bytes=system_bytes
    )


def plan_for(name: str, machine: Machine, forced: str | None = None, weights: str = "none"):
    spec = SPECS[name]
    return choose_plan(spec, MemoryModel.of(spec, None, machine, weights=weights), machine, forced=forced)


@pytest.mark.parametrize(
    ("name", "free", "offload", "tiling"),
    [
        ("cogvideox-5b", 139, "resident", False),
        ("cogvideox-5b", 39, "resident", False),
        ("cogvideox-5b", 31, "text", False),
        ("cogvideox-5b", 23, "model", False),
        ("cogvideox-5b", 15, "model", True),
        ("cogvideox-5b", 11, "group", True),
        ("cogvideox1.5-5b", 139, "resident", False),
        ("cogvideox1.5-5b", 47, "resident", True),
        ("cogvideox1.5-5b", 24, "text", True),
    ],
)
def test_chooses_the_fastest_plan_and_tiles_only_where_no_plan_decodes_untiled(name, free, offload, tiling):
    plan = plan_for(name, gpu(free))
    assert (plan.offload, plan.tiling) == (offload, tiling), str(plan)
    assert plan.need <= free * GIB


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b-i2v", "cogvideox1.5-5b"])
def test_each_plan_needs_less_than_the_one_before(name):
    memory = MemoryModel.of(SPECS[name], None, gpu(80))
    clip = usual_clip(SPECS[name])
    needs = [max(memory.peaks(clip, offload, tiled=True).values()) for offload in OFFLOADS]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) > 3


def test_more_frames_a_larger_size_guidance_and_a_lora_need_more():
    memory = MemoryModel.of(SPECS["cogvideox-5b"], None, gpu(80))
    small = Clip(width=720, height=480, frames=25, guided=False)

    def denoising(clip, **options):
        return memory.peaks(clip, "resident", tiled=False, **options)["denoising"]

    for larger in ({"frames": 49}, {"width": 1360}, {"guided": True}):
        assert denoising(replace(small, **larger)) > denoising(small), larger
    assert denoising(small, lora_bytes=10**6) == denoising(small) + 10**6


def test_quantized_weights_take_about_half():
    whole, small = (
        MemoryModel.of(SPECS["cogvideox-5b"], None, gpu(80), weights=weights).part_bytes()
        for weights in ("none", "int8")
    )
    assert small["vae"] == whole["vae"]
    for part in ("transformer", "text_encoder"):
        assert 0.5 < small[part] / whole[part] < 0.55


def test_a_forced_plan_is_taken_even_if_memory_is_tight():
    assert plan_for("cogvideox-5b", gpu(139), forced="sequential").offload == "sequential"
    tight = plan_for("cogvideox-5b", gpu(10), forced="resident")
    assert (tight.offload, tight.tiling) == ("resident", True)
    assert "tight, as COGVIDEOX_OFFLOAD asks" in str(tight)
    assert tight.tiled(usual_clip(SPECS["cogvideox-5b"])) is True


def test_a_cpu_keeps_the_model_resident_and_refuses_other_plans():
    plan = plan_for("cogvideox-2b", CPU)
    assert (plan.offload, plan.tiling, plan.room) == ("resident", False, None)
    with pytest.raises(UserError, match="COGVIDEOX_OFFLOAD=model needs a GPU; on this CPU only resident"):
        plan_for("cogvideox-2b", CPU, forced="model")


def test_a_cpu_without_enough_memory_is_refused_with_the_needed_and_the_free_bytes():
    with pytest.raises(UserError) as refused:
        plan_for("cogvideox-5b", replace(CPU, free_bytes=20 * GIB))
    assert re.fullmatch(
        r"num_frames=49 at 720x480 needs about \d+\.\d GiB of system memory with cogvideox-5b "
        r"\(resident, VAE in tiles\), and 19\.0 GiB can be used\. No released model fits either; more memory "
        r"is needed\.",
        str(refused.value),
    )


def test_a_request_is_decoded_in_tiles_only_when_it_does_not_fit_untiled():
    plan = plan_for("cogvideox1.5-5b", gpu(47))
    assert plan.tiled(usual_clip(SPECS["cogvideox1.5-5b"])) is True
    assert plan.tiled(Clip(width=720, height=480, frames=17)) is False


def test_a_request_that_does_not_fit_is_refused_with_what_does():
    plan = plan_for("cogvideox1.5-5b", gpu(9.8))
    assert plan.tiled(Clip(width=1360, height=768, frames=81)) is True
    with pytest.raises(UserError) as refused:
        plan.tiled(Clip(width=1360, height=768, frames=129))
    message = str(refused.value)
    assert message.startswith("num_frames=129 at 1360x768 needs about ")
    longest = int(re.search(r"up to num_frames=(\d+) fits", message)[1])
    plan.tiled(Clip(width=1360, height=768, frames=longest))
    with pytest.raises(UserError):
        plan.tiled(Clip(width=1360, height=768, frames=longest + 16))
    assert "guidance_scale=1 fits." in message
    assert "COGVIDEOX_MODEL=cogvideox-5b or cogvideox-2b fits." in message


def test_the_service_starts_where_only_shorter_clips_fit():
    plan = plan_for("cogvideox1.5-5b", gpu(7))
    assert plan.frames < SPECS["cogvideox1.5-5b"].frames
    assert f"for {plan.frames} frames, the most that fit" in str(plan)
    plan.tiled(Clip(width=1360, height=768, frames=plan.frames))


def test_a_card_on_which_no_clip_fits_is_refused():
    with pytest.raises(UserError, match=r"of GPU memory with cogvideox1.5-5b \(sequential, VAE in tiles\)"):
        plan_for("cogvideox1.5-5b", gpu(2))


def test_a_plan_whose_offloaded_weights_exceed_system_memory_is_skipped():
    assert plan_for("cogvideox-5b", gpu(23, system=64)).offload == "model"
    narrow = plan_for("cogvideox-5b", gpu(23, system=12))
    assert (narrow.offload, narrow.tiling) == ("text", True)  # only T5 is offloaded


def test_the_table_in_the_documentation_is_what_the_command_prints():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- script/plan -->\n(.*?)\n<!-- end -->", page, re.DOTALL)[1]
    assert shown == markdown(rows())


def test_the_readme_names_what_the_resident_and_the_smallest_plan_need():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in {row["model"] for row in rows(("none",))}:
        memory = MemoryModel.of(SPECS[name], None, replace(gpu(80), dtype=SPECS[name].dtype))
        clip = usual_clip(SPECS[name])
        whole = needed(memory, clip, "resident", tiled=False)
        least = min(needed(memory, clip, offload, tiled=True) for offload in OFFLOADS)
        shown = " | ".join(f"{math.ceil(need / USABLE / GIB)} GiB" for need in (whole, least))
        assert re.search(rf"\| `{re.escape(name)}` \|.*\| {shown} \|", readme), (name, shown)


def test_the_table_has_every_released_checkpoint_on_every_card():
    found = rows()
    assert {row["model"] for row in found} == {
        name for name, spec in SPECS.items() if spec.repository and spec.task != "caption"
    }
    assert sorted({row["card"] for row in found}) == [6, 8, 12, 16, 24, 40, 48, 80, 141]
    for row in found:
        assert row["plan"] is None or row["gib"] <= row["card"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_free_system_memory_is_limited_by_a_control_group(tmp_path):
    assert free_system_bytes(tmp_path) is None
    write(tmp_path / "proc/meminfo", "MemTotal: 3000 kB\nMemAvailable:    2000 kB\n")
    assert free_system_bytes(tmp_path) == 2000 * 1024
    write(tmp_path / "proc/self/cgroup", "0::/jobs/one\n")
    write(tmp_path / "sys/fs/cgroup/jobs/one/memory.max", "max\n")
    assert free_system_bytes(tmp_path) == 2000 * 1024
    write(tmp_path / "sys/fs/cgroup/jobs/memory.max", "1000000\n")
    write(tmp_path / "sys/fs/cgroup/jobs/memory.current", "700000\n")
    assert free_system_bytes(tmp_path) == 300_000
    write(tmp_path / "sys/fs/cgroup/jobs/memory.stat", "anon 5\ninactive_file 50000\n")
    assert free_system_bytes(tmp_path) == 350_000


def test_control_groups_of_version_1_are_read_too(tmp_path):
    write(tmp_path / "proc/meminfo", "MemAvailable:    2000 kB\n")
    write(tmp_path / "proc/self/cgroup", "5:cpu:/elsewhere\n4:memory:/docker/abc\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "900000\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.usage_in_bytes", "400000\n")
    assert free_system_bytes(tmp_path) == 500_000


def test_quantized_weights_are_never_offloaded_layer_by_layer():
    spec = SPECS["cogvideox1.5-5b"]
    machine = Machine(device="cuda", free_bytes=int(7.3 * GIB), dtype="bfloat16")
    plain, small = (MemoryModel.of(spec, None, machine, weights=weights) for weights in ("none", "int8"))
    assert choose_plan(spec, plain, machine).offload == "sequential"
    assert choose_plan(spec, small, machine).offload == "group"


def test_group_offloading_needs_system_memory_for_one_part_twice_while_it_is_pinned():
    machine = Machine(device="cuda", free_bytes=16 * GIB, dtype="bfloat16")
    memory = MemoryModel.of(SPECS["cogvideox-5b"], None, machine)
    parts = memory.part_bytes()
    assert memory.offloaded_bytes("group") == 2 * parts["transformer"] + parts["text_encoder"]
    assert memory.offloaded_bytes("model") == sum(parts.values())
