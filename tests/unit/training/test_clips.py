"""Files to training samples, with clips whose pixels encode the frame number."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lib.errors import UserError
from lib.video.writer import write_video
from tests.unit.video.test_reader import rotate_in_metadata, write_sound
from training.clips import Sample, Sampling, clip_samples, sections

ROOT = Path(__file__).resolve().parents[3]


def sampling(**changes) -> Sampling:
    standard = {
        "fps": 8, "frame_step": 8, "max_frames": 49, "width": 64, "height": 48, "fit": "center",
        "random_crops": 1, "flip": False, "skip_frames_start": 0, "skip_frames_end": 0,
        "long_clips": "split", "seed": 0,
    }  # fmt: skip
    return Sampling(**{**standard, **changes})


def numbered(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Frame i says i in its middle, as two grey bands of 16 levels each, on a background of mid-grey."""
    frames = np.full((count, height, width, 3), 128, np.uint8)
    band = height // 8
    for index, frame in enumerate(frames):
        frame[height // 2 - band : height // 2] = 8 + 16 * (index // 16)
        frame[height // 2 : height // 2 + band] = 8 + 16 * (index % 16)
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames these are."""
    height, width = frames.shape[1:3]
    inset = max(1, height // 24)
    columns = slice(width * 2 // 5, width * 3 // 5)
    tens = frames[:, height // 2 - height // 8 + inset : height // 2 - inset, columns].mean((1, 2, 3))
    ones = frames[:, height // 2 + inset : height // 2 + height // 8 - inset, columns].mean((1, 2, 3))
    digits = np.rint((np.stack([tens, ones]) - 8) / 16).astype(int)
    return (16 * digits[0] + digits[1]).tolist()


def clip(path: Path, count: int, *, fps: float, width: int = 64, height: int = 48) -> Path:
    return write_video(numbered(count, width, height), path, fps=fps, format=path.suffix[1:], metadata={})


def timed_clip(path: Path, milliseconds: list[int]) -> Path:
    """A file whose frames begin to be shown at these times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count, stream.codec_context.time_base = 1, Fraction(1, 1000)
        for pixels, time in zip(numbered(len(milliseconds)), milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def regular(count: int, fps: float) -> tuple[np.ndarray, float]:
    return np.arange(count) / fps, count / fps


# Which frames


def test_a_clip_of_97_frames_at_30_fps_is_sampled_over_its_full_length(tmp_path):
    (sample,) = clip_samples(clip(tmp_path / "a.mp4", 97, fps=30), sampling())
    # 3.23 s are 26 frames at 8 fps, of which 8N+1 takes 25: the last is shown after 3 s of 3.23.
    assert numbers(sample.frames) == [index * 30 // 8 for index in range(25)]
    assert sample.frames.shape == (25, 48, 64, 3) and sample.frames.dtype == np.uint8
    assert (sample.section, sample.crop, sample.flipped) == (0, 0, False)


def test_a_clip_of_60_frames_at_30_fps_becomes_two_sections_that_cover_it(tmp_path):
    first, second = clip_samples(clip(tmp_path / "a.mp4", 60, fps=30), sampling())
    # 16 frames at 8 fps: nine from the start, and the last nine.
    assert numbers(first.frames) == [0, 3, 7, 11, 15, 18, 22, 26, 30]
    assert numbers(second.frames) == [26, 30, 33, 37, 41, 45, 48, 52, 56]
    assert second.section == 1


def test_cutting_keeps_the_first_section_only(tmp_path):
    (sample,) = clip_samples(clip(tmp_path / "a.mp4", 60, fps=30), sampling(long_clips="cut"))
    assert numbers(sample.frames) == [0, 3, 7, 11, 15, 18, 22, 26, 30]


def test_a_clip_of_one_frame_is_too_short(tmp_path):
    with pytest.raises(UserError) as error:
        list(clip_samples(clip(tmp_path / "a.mp4", 1, fps=30), sampling()))
    assert str(error.value) == (
        "too short: 1 frame in 0.03 s make 0 at 8 fps; at least 9 are needed (1.12 s)"
    )


def test_frames_repeat_where_the_file_has_fewer_than_the_base(tmp_path):
    (sample,) = clip_samples(
        clip(tmp_path / "a.mp4", 10, fps=8), sampling(fps=16, frame_step=16, max_frames=81)
    )
    assert numbers(sample.frames) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8]


@pytest.mark.parametrize(("ending", "fps"), [("mp4", 8), ("webm", 16), ("gif", 8), ("gif", 12), ("webm", 30)])
def test_a_clip_at_the_bases_rate_keeps_each_frame_once(tmp_path, ending, fps):
    """Matroska rounds times to milliseconds, a GIF to centiseconds; neither doubles or drops a frame."""
    (sample,) = clip_samples(clip(tmp_path / f"a.{ending}", 49, fps=fps), sampling(fps=fps))
    assert numbers(sample.frames) == list(range(49))


def test_with_a_variable_rate_each_sample_frame_is_the_one_shown_at_its_time(tmp_path):
    times = [0, 90, 300, 350, 800, 810, 1000, 1300]
    (sample,) = clip_samples(timed_clip(tmp_path / "phone.mp4", times), sampling())
    moments = [125 * index for index in range(9)]
    assert numbers(sample.frames) == [max(i for i, t in enumerate(times) if t <= m) for m in moments]
    assert numbers(sample.frames) == [0, 1, 1, 3, 3, 3, 3, 5, 6]


def test_skipped_frames_are_counted_in_the_file(tmp_path):
    path = clip(tmp_path / "a.mp4", 60, fps=24)
    (sample,) = clip_samples(path, sampling(skip_frames_start=10, skip_frames_end=20))
    assert numbers(sample.frames) == [10 + 3 * index for index in range(9)]


def test_skipping_too_many_frames_is_refused():
    with pytest.raises(UserError) as error:
        sections(*regular(60, 30), sampling(skip_frames_start=40, skip_frames_end=20))
    assert str(error.value) == (
        "too short: it has 60 frames, and 40 at its start and 20 at its end are skipped"
    )
    with pytest.raises(UserError) as error:
        sections(*regular(60, 30), sampling(skip_frames_start=20, skip_frames_end=20))
    assert str(error.value) == (
        "too short: 20 frames in 0.67 s after skipping 40 make 5 at 8 fps; at least 9 are needed (1.12 s)"
    )


@pytest.mark.parametrize("fps", [8, 12.5, 23.976, 29.97, 60])
@pytest.mark.parametrize("count", [71, 240, 1000, 3001])
@pytest.mark.parametrize("rule", [(8, 8, 49), (16, 16, 81), (8, 4, 13)])
def test_sections_have_valid_equal_lengths_and_leave_nothing_out(count, fps, rule):
    rate, step, most = rule
    times, duration = regular(count, fps)
    found = sections(times, duration, sampling(fps=rate, frame_step=step, max_frames=most))
    (length,) = {len(part) for part in found}
    total = round(duration * rate)
    assert length == max(n for n in range(step + 1, most + 1, step) if n <= total)
    assert all((np.diff(part) >= 0).all() for part in found)
    expected = [int(np.searchsorted(times, k / rate + 1e-6, side="right")) - 1 for k in range(total)]
    assert found[0].tolist() == expected[:length]
    if len(found) == 1:
        assert total - length < length / 4
    else:
        assert len(found) == -(-total // length)
        assert found[-1].tolist() == expected[-length:]
        assert {index for part in found for index in part.tolist()} == set(expected)


def test_clips_are_split_once_a_quarter_is_left_over():
    lengths = {count: len(sections(*regular(count, 8), sampling())) for count in (49, 61, 62, 98, 99)}
    assert lengths == {49: 1, 61: 1, 62: 2, 98: 2, 99: 3}


def test_clips_of_hours_are_refused_with_the_limit_unless_they_are_cut():
    times, duration = regular(250_000, 25)
    with pytest.raises(UserError) as error:
        sections(times, duration, sampling())
    assert str(error.value) == (
        "too long: 10000 s are 80,000 frames at 8 fps, and one file may have 10,000 (1250 s): make several "
        "clips of it, each with its own caption, or use long_clips=cut"
    )
    (first,) = sections(times, duration, sampling(long_clips="cut"))
    assert first.tolist() == [index * 25 // 8 for index in range(49)]


@pytest.mark.parametrize("times", [[0.0] * 30, [float("nan")] * 30, [0.0] * 29 + [float("inf")]])
def test_a_file_without_usable_timestamps_is_refused(times):
    with pytest.raises(UserError, match="its frames have no timestamps: convert it to mp4"):
        sections(np.array(times), times[-1], sampling())


# Which pixels


def painted(path: Path, width: int, height: int, picture: np.ndarray) -> Path:
    """A clip of nine frames that all are this picture, blown up to the size."""
    rows = np.arange(height) * picture.shape[0] // height
    columns = np.arange(width) * picture.shape[1] // width
    return write_video(
        np.repeat(picture[rows][:, columns][None], 9, axis=0), path, fps=8, format="webm", metadata={}
    )


def ramp(width: int) -> np.ndarray:
    """One row that gets lighter to the right, from 20 to 220."""
    return np.linspace(20, 220, width).round().astype(np.uint8)[None, :, None].repeat(3, axis=2)


def lightness(sample: Sample, column: int) -> float:
    return float(sample.frames[:, :, column].mean())


@pytest.mark.parametrize(
    "size", [(64, 48), (63, 47), (48, 64), (36, 64), (640, 360), (361, 641), (16, 12), (20, 90), (8, 8)]
)
@pytest.mark.parametrize("fit", ["center", "random", "none"])
def test_every_shape_is_fitted_to_the_requested_size(tmp_path, size, fit):
    path = painted(tmp_path / "a.webm", *size, np.full((1, 1, 3), 200, np.uint8))
    for width, height in ((64, 48), (48, 80)):
        (sample,) = clip_samples(path, sampling(fit=fit, width=width, height=height))
        assert sample.frames.shape == (9, height, width, 3)
        scale = min(width / size[0], height / size[1])
        shown = (sample.frames[4] > 100).all(-1)
        if fit != "none":
            assert shown.all()
        else:
            assert abs(int(shown.any(0).sum()) - size[0] * scale) <= 1
            assert abs(int(shown.any(1).sum()) - size[1] * scale) <= 1
            margins = np.flatnonzero(shown.any(0))[[0, -1]] + [0, 1 - width]
            assert abs(margins.sum()) <= 1
            assert sample.frames[4][~shown].max(initial=0) == 0


def test_a_portrait_clip_is_cropped_at_top_and_bottom_equally(tmp_path):
    picture = np.zeros((160, 90, 3), np.uint8)
    picture[60:100, 25:65] = 255  # a square in the middle
    (sample,) = clip_samples(painted(tmp_path / "a.webm", 90, 160, picture), sampling())
    square = sample.frames[4].mean(-1) > 128
    # 90 pixels become 64: the square of 40 becomes one of 28, in the middle.
    rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
    assert abs(len(rows) - 28.4) < 1.5 and abs(len(columns) - 28.4) < 1.5
    assert abs(rows.mean() - 23.5) < 1 and abs(columns.mean() - 31.5) < 1


def test_center_cuts_both_sides_of_a_wide_clip_equally(tmp_path):
    path = painted(tmp_path / "a.webm", 192, 48, ramp(192))
    (sample,) = clip_samples(path, sampling())
    assert lightness(sample, 0) == pytest.approx(20 + 200 * 64 / 191, abs=4)
    assert lightness(sample, 63) == pytest.approx(20 + 200 * 127 / 191, abs=4)


def test_random_crops_differ_and_are_the_same_for_the_same_seed(tmp_path):
    path = painted(tmp_path / "a.webm", 192, 48, ramp(192))
    found = {
        seed: list(clip_samples(path, sampling(fit="random", random_crops=8, seed=seed))) for seed in (1, 2)
    }
    again = list(clip_samples(path, sampling(fit="random", random_crops=8, seed=1)))
    assert [s.crop for s in found[1]] == list(range(8))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(found[1], again, strict=True))
    left = {
        seed: [round((lightness(s, 0) - 20) / 200 * 191) for s in samples] for seed, samples in found.items()
    }
    assert left[1] != left[2] and len(set(left[1])) > 4
    assert min(left[1] + left[2]) >= -3 and max(left[1] + left[2]) <= 131
    for sample in found[1]:  # not squeezed, and the same place in all of its frames
        assert lightness(sample, 63) - lightness(sample, 0) == pytest.approx(200 * 63 / 191, abs=5)
        assert np.ptp(sample.frames[:, :, 0].mean((1, 2))) < 3


def test_a_mirrored_variant_follows_each_sample(tmp_path):
    path = clip(tmp_path / "a.mp4", 60, fps=30, width=96)
    found = list(clip_samples(path, sampling(flip=True, fit="random", random_crops=2)))
    assert [(s.section, s.crop, s.flipped) for s in found] == [
        (section, crop, flipped) for section in (0, 1) for crop in (0, 1) for flipped in (False, True)
    ]
    for plain, mirrored in zip(found[::2], found[1::2], strict=True):
        assert np.array_equal(plain.frames[:, :, ::-1], mirrored.frames)
        assert mirrored.frames.flags.c_contiguous and plain.frames.flags.c_contiguous


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_phones_clip_is_turned_upright(tmp_path, degrees):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:16, :16] = 255
    path = write_video(np.repeat(picture[None], 9, 0), tmp_path / "a.mp4", fps=8, format="mp4", metadata={})
    rotate_in_metadata(path, degrees)
    width, height = (64, 48) if degrees == 180 else (48, 64)
    (sample,) = clip_samples(path, sampling(width=width, height=height))
    corner = {90: (8, -8), 180: (-8, -8), 270: (-8, 8)}[degrees]
    assert sample.frames[4][corner].min() > 200
    assert sum(sample.frames[4][y, x].min() > 200 for y in (8, -8) for x in (8, -8)) == 1


def test_a_strip_that_would_lose_nearly_everything_is_refused(tmp_path):
    path = painted(tmp_path / "a.webm", 1600, 40, ramp(1600))
    with pytest.raises(UserError) as error:
        list(clip_samples(path, sampling()))
    assert str(error.value) == (
        "too narrow: 1600x40 would lose more than 15/16 of its picture when cut to 64x48: "
        "use video_reshape_mode=none"
    )
    (sample,) = clip_samples(path, sampling(fit="none"))
    assert sample.frames.shape == (9, 48, 64, 3)


# Which files


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mov", "libx264"), ("a.m4v", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"),
        ("a.flv", "flv"), ("a.mpg", "mpeg1video"), ("a.mpeg", "mpeg2video"), ("a.wmv", "wmv2"),
    ],
)  # fmt: skip
def test_reads_the_other_containers_frame_by_frame(tmp_path, name, codec):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count, stream.codec_context.bit_rate = 1, 4_000_000
        for pixels in numbered(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    first, second = clip_samples(path, sampling())
    expected = [index * 25 // 8 for index in range(16)]
    assert [*numbers(first.frames), *numbers(second.frames)] == [*expected[:9], *expected[-9:]]


def test_files_that_are_not_videos_are_refused_with_the_reason(tmp_path):
    cut = clip(tmp_path / "cut.mp4", 60, fps=30)
    cut.write_bytes(cut.read_bytes()[:600])
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(20_000))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    reasons = {}
    for name in ("cut", "noise", "empty", "text"):
        with pytest.raises(UserError) as error:
            list(clip_samples(tmp_path / f"{name}.mp4", sampling()))
        reasons[name] = str(error.value)
    with pytest.raises(UserError) as error:
        list(clip_samples(write_sound(tmp_path / "sound.mp4"), sampling()))
    assert reasons["noise"] == (
        "video noise.mp4 cannot be decoded: it is not a video, or it is damaged or cut off"
    )
    assert reasons["cut"].startswith("video cut.mp4 cannot be decoded: ")
    assert reasons["empty"] == "video empty.mp4 is empty (0 bytes)"
    assert reasons["text"] == "video text.mp4 is a text file or playlist, not a video"
    assert "it has no video stream" in str(error.value)


def test_the_decoder_ends_when_the_iterator_is_closed(tmp_path):
    found = clip_samples(clip(tmp_path / "a.mp4", 120, fps=8), sampling(max_frames=9))
    assert next(found).section == 0
    video = found.gi_frame.f_locals["video"]
    found.close()
    with pytest.raises(ProcessLookupError):
        os.kill(video.decoder.pid, 0)


PEAK = """
import resource, sys
from pathlib import Path
from tests.unit.training.test_clips import sampling
from training.clips import clip_samples
settings = sampling(max_frames=25, width=256, height=192, fit="random", random_crops=2, flip=True)
count = sum(1 for _ in clip_samples(Path(sys.argv[1]), settings))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_clip(tmp_path):
    """A section of 25 frames is 3.7 MB, and the long clip has 41."""
    found = []
    for seconds in (8, 128):
        still = np.zeros((96, 128, 3), np.uint8)
        frames = (still for _ in range(seconds * 8))
        path = write_video(frames, tmp_path / f"{seconds}.mp4", fps=8, format="mp4", metadata={})
        command = [sys.executable, "-P", "-c", "import sys; sys.path.insert(0, sys.argv.pop(1))" + PEAK]
        done = subprocess.run([*command, ROOT, path], capture_output=True, text=True, check=True)
        found.append([int(word) for word in done.stdout.split()])
    (short, little), (long, much) = found
    assert (short, long) == (3 * 4, 41 * 4)
    assert much - little < 20_000, f"{little} kB for 8 s, {much} kB for 128 s"
