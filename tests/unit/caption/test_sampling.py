"""Which frames the captioner sees, against the original's own loops written out."""

import numpy as np
import pytest

from lib.caption.sampling import MAX_FRAMES, choose_frames


def original_chat(timestamps: list[float]) -> list[int]:
    found = []
    for second in range(round(max(timestamps)) + 1):
        nearest = min(timestamps, key=lambda time: abs(time - second))
        found.append(timestamps.index(nearest))
        if len(found) >= 24:
            break
    return found


def original_base(count: int, fps: float) -> list[int]:
    return np.linspace(0, min(count, int(60 * fps)) - 1, 24, dtype=int).tolist()


def chosen(timestamps, sampling: str, *, fps: float) -> list[int]:
    times = np.asarray(timestamps, dtype=np.float64)
    found, used = choose_frames(times, fps=fps, duration=float(times[-1]) + 1 / fps, sampling=sampling)
    assert used == sampling
    assert found == sorted(set(found)) and len(found) <= MAX_FRAMES
    return found


@pytest.mark.parametrize("seed", range(20))
def test_chat_and_base_choose_what_the_original_chooses_but_none_twice(seed):
    random = np.random.default_rng(seed)
    fps = float(random.choice([0.3, 1, 2, 8, 12.5, 23.976, 30, 60]))
    count = int(random.integers(1, 3000))
    times = np.arange(count) / fps
    if seed % 2:  # variable frame rate
        times = np.cumsum(random.exponential(1 / fps, count))
        times -= times[0]
    assert chosen(times, "chat", fps=fps) == sorted(set(original_chat(times.tolist())))
    assert chosen(times, "base", fps=fps) == sorted(set(original_base(count, fps)))


def test_chat_reads_23_seconds_of_a_longer_clip_and_uniform_all_of_it():
    times = np.arange(90 * 30) / 30
    assert chosen(times, "chat", fps=30) == [30 * second for second in range(24)]
    evenly = chosen(times, "uniform", fps=30)
    assert len(evenly) == 24 and evenly[0] == 0 and evenly[-1] == 2699
    assert np.ptp(np.diff(evenly)) <= 1
    assert chosen(times, "base", fps=30)[-1] == 1799


@pytest.mark.parametrize("sampling", ["chat", "base", "uniform"])
def test_a_single_frame_is_taken_once(sampling):
    assert chosen([0.0], sampling, fps=8) == [0]


def test_uniform_takes_every_frame_of_a_clip_with_fewer_than_24():
    assert chosen(np.arange(9) / 8, "uniform", fps=8) == list(range(9))
    assert chosen(np.arange(24) / 8, "uniform", fps=8) == list(range(24))
    assert len(chosen(np.arange(25) / 8, "uniform", fps=8)) == 24


@pytest.mark.parametrize(
    ("seconds", "used"), [(0.5, "uniform"), (1.9, "uniform"), (2, "chat"), (24, "chat"), (25, "uniform")]
)
def test_auto_is_one_frame_a_second_unless_the_clip_is_short_or_long(seconds, used):
    times = np.arange(round(seconds * 10)) / 10
    found, sampling = choose_frames(times, fps=10, duration=seconds, sampling="auto")
    assert sampling == used
    assert found == choose_frames(times, fps=10, duration=seconds, sampling=used)[0]


def test_base_without_a_known_rate_takes_the_whole_clip():
    found, _ = choose_frames(np.zeros(50), fps=0.0, duration=0.0, sampling="base")
    assert found[0] == 0 and found[-1] == 49 and len(found) == 24
