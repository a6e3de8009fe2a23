"""The data set is never completely in memory."""

import pytest

from bench.training_memory import peak_bytes, render_clips

pytestmark = pytest.mark.slow

FRAMES = 97
COUNTS = (1, 6)


def test_peak_memory_does_not_depend_on_the_number_of_clips(tmp_path):
    peaks = []
    for count in COUNTS:
        folder = tmp_path / str(count)
        folder.mkdir()
        render_clips(folder / "clips", count, FRAMES)
        peaks.append(peak_bytes(folder, "run", 2))
    frame_bytes = 48 * 64 * 3 * 4  # of the embedded models' clips, in float32
    added = (COUNTS[1] - COUNTS[0]) * FRAMES * frame_bytes
    assert peaks[1] - peaks[0] < 0.5 * added
    assert peaks[1] < 1.05 * peaks[0]
