import pytest

from lib.distributed.layout import (
    Layout,
    ParallelPlan,
    best_layout,
    divides_evenly,
    heads_divide,
    plan_processes,
)
from lib.errors import UserError


@pytest.mark.parametrize(
    ("processes", "heads", "guided", "shared"),
    [
        (2, 48, True, "cfg2"),
        (4, 48, True, "cfg2xulysses2"),
        (8, 48, True, "cfg2xulysses4"),
        (8, 30, True, "cfg2xulysses4"),
        (6, 48, True, "cfg2xulysses3"),
        (3, 48, True, "ulysses3"),
        (2, 30, False, "ulysses2"),
        (8, 48, False, "ulysses8"),
        (8, 30, False, "ulysses8"),
        (1, 48, True, "one"),
    ],
)
def test_guidance_branches_are_divided_first_then_the_sequence(processes, heads, guided, shared):
    layout = best_layout(processes, heads=heads, guided=guided)
    assert (str(layout), layout.copies, layout.processes) == (shared, 1, processes)


def test_groups_repeat_the_work_where_heads_cannot_be_divided_further():
    assert best_layout(4, heads=6, guided=False) == Layout(sequence=2, copies=2)


def test_padded_heads_leave_the_last_process_a_real_head():
    assert heads_divide(30, 4)
    assert not heads_divide(6, 4)  # 2, 2, 2 and 0


def test_plain_ulysses_needs_lengths_that_divide():
    assert divides_evenly(2, heads=48, text_tokens=226, video_tokens=17_550)
    assert not divides_evenly(4, heads=48, text_tokens=226, video_tokens=17_550)
    assert not divides_evenly(4, heads=30, text_tokens=224, video_tokens=45_696)


def test_every_gpu_is_used_unless_the_setting_says_otherwise():
    assert plan_processes("", gpus=8, heads=48) == ParallelPlan(processes=8, heads=48)
    assert plan_processes("off", gpus=8, heads=48).processes == 1
    assert plan_processes("1", gpus=8, heads=48).processes == 1
    assert plan_processes("4", gpus=8, heads=48).processes == 4
    assert plan_processes("", gpus=0, heads=48).processes == 1
    assert plan_processes("2", gpus=0, heads=48).processes == 2


def test_gpus_that_would_only_repeat_work_are_left_out():
    assert plan_processes("", gpus=7, heads=30).processes == 6


def test_a_forced_layout_applies_to_requests_with_guidance():
    plan = plan_processes("cfg2xulysses2", gpus=4, heads=48)
    assert plan.processes == 4
    assert str(plan.layout(guided=True)) == "cfg2xulysses2"
    assert str(plan.layout(guided=False)) == "ulysses4"
    ulysses = plan_processes("ulysses4", gpus=4, heads=48)
    assert str(ulysses.layout(guided=True)) == "ulysses4"


@pytest.mark.parametrize(
    ("asked", "gpus", "heads", "message"),
    [
        (
            "cfg3",
            4,
            48,
            "COGVIDEOX_PARALLEL=cfg3 is unknown; allowed are off, a number of processes, cfg2, ulysses2 and "
            "more, cfg2xulysses2 and more.",
        ),
        ("4", 2, 48, "COGVIDEOX_PARALLEL=4 needs 4 GPUs; this machine has 2 GPUs."),
        ("cfg2", 1, 48, "COGVIDEOX_PARALLEL=cfg2 needs 2 GPUs; this machine has 1 GPU."),
        ("64", 0, 48, "COGVIDEOX_PARALLEL=64: at most 16 processes can share a CPU."),
        (
            "7",
            8,
            30,
            "COGVIDEOX_PARALLEL=7: 7 processes cannot share a model with 30 attention heads; the nearest "
            "number that can is 6.",
        ),
        (
            "ulysses4",
            4,
            6,
            "COGVIDEOX_PARALLEL=ulysses4: 4 processes cannot share a sequence of 6 attention heads; the "
            "nearest number that can is 3.",
        ),
    ],
)
def test_an_impossible_setting_is_refused_with_what_is_possible(asked, gpus, heads, message):
    with pytest.raises(UserError) as refused:
        plan_processes(asked, gpus=gpus, heads=heads)
    assert str(refused.value) == message
