"""Reading videos whose frame numbers are encoded in their pixels."""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.video import reader
from lib.video.reader import VideoInfo, open_video
from tests.video_decoding import decode, probe

QUICK = {
    "libx264": {"preset": "veryfast"},
    "libx265": {"x265-params": "log-level=none:pools=1"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
}


def brightness(index: int) -> int:
    return 20 + 10 * index


def write_clip(
    path: Path,
    *,
    codec="libx264",
    count=12,
    width=64,
    height=48,
    times=None,
    pixels="yuv420p",
    gop=250,
    **options,
) -> Path:
    """Write frames of grey brightness(i) with a white block in the top left corner; times in milliseconds."""
    times = times or [100 * index for index in range(count)]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10, options=QUICK.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count, stream.codec_context.gop_size = 1, gop
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, pts in enumerate(times):
            pixel = np.full((height, width, 3), brightness(index), np.uint8)
            pixel[: height // 3, : width // 3] = 255
            frame = av.VideoFrame.from_ndarray(pixel, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for index in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, index * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def rotate_in_metadata(path: Path, degrees: int) -> None:
    """Set a clockwise rotation in the 3x3 matrix of the mp4's `tkhd` box, version 0."""
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    write_display_matrix(path, cosine, sine, -sine, cosine)


def write_display_matrix(path: Path, *axes: int) -> None:
    """Set the directions of the picture's x axis and y axis on the screen, two numbers each."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (axis << 16 for axis in axes)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Read the frame numbers from the middle of the frames."""
    _, height, width, _ = frames.shape
    middle = frames[:, height * 2 // 5 : height * 3 // 5, width * 2 // 5 : width * 3 // 5].mean((1, 2, 3))
    return [round((value - 20) / 10) for value in middle]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h264.mp4", {}),
        ("h264.mkv", {"codec": "libx264"}),
        ("hevc.mp4", {"codec": "libx265"}),
        ("hevc-10-bit.mp4", {"codec": "libx265", "pixels": "yuv420p10le"}),
        ("vp9.webm", {"codec": "libvpx-vp9"}),
        ("av1.mp4", {"codec": "libsvtav1"}),
        ("odd.mkv", {"width": 63, "height": 47, "pixels": "yuv444p"}),
        ("portrait.mp4", {"width": 48, "height": 64}),  # whose rows FFmpeg pads
        ("tiny.mp4", {"width": 16, "height": 32}),
    ],
)
def test_decodes_every_frame_in_order(tmp_path, name, options):
    path = write_clip(tmp_path / name, **options)
    width, height = options.get("width", 64), options.get("height", 48)
    clip = decode(path)
    assert clip.frames.shape == (12, height, width, 3) and clip.frames.dtype == np.uint8
    assert frame_numbers(clip.frames) == list(range(12))
    assert clip.frames[:, 2, 2].min() > 235  # the white block
    assert np.abs(clip.frames[:, -1, -1].astype(int) - clip.frames[:, -1, 0]).max() < 12
    assert clip.fps == pytest.approx(10) and clip.timestamps == pytest.approx(np.arange(12) / 10, abs=1e-3)
    assert probe(path) == VideoInfo(12, clip.fps, width, height, pytest.approx(1.2, abs=0.01))


def test_decodes_only_the_chosen_frames(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", gop=4)
    clip = decode(path, indices=[0, 2, 7, 11])
    assert frame_numbers(clip.frames) == [0, 2, 7, 11]
    assert clip.timestamps == pytest.approx([0, 0.2, 0.7, 1.1])


def test_scales_while_decoding(tmp_path):
    clip = decode(write_clip(tmp_path / "clip.mp4"), size=(40, 100), indices=[0, 4])
    assert clip.frames.shape == (2, 100, 40, 3) and frame_numbers(clip.frames) == [0, 4]


@pytest.mark.parametrize(
    ("degrees", "size", "corner"),
    [(90, (48, 64), (2, -3)), (180, (64, 48), (-3, -3)), (270, (48, 64), (-3, 2))],
)
def test_applies_the_rotation_in_the_metadata(tmp_path, degrees, size, corner):
    path = write_clip(tmp_path / "phone.mp4")
    rotate_in_metadata(path, degrees)
    clip = decode(path)
    assert (probe(path).width, probe(path).height) == size
    assert clip.frames.shape[1:3] == size[::-1] and frame_numbers(clip.frames) == list(range(12))
    others = {(2, 2), (2, -3), (-3, 2), (-3, -3)} - {corner}
    assert clip.frames[0][corner].min() > 235 and all(clip.frames[0][place].max() < 40 for place in others)
    scaled = decode(path, size=(100, 20), indices=[0]).frames[0]
    assert scaled.shape == (20, 100, 3) and scaled[corner].min() > 225
    assert all(scaled[place].max() < 50 for place in others)


@pytest.mark.parametrize(("axes", "corner"), [((-1, 0, 0, 1), (2, -3)), ((0, -1, -1, 0), (-3, -3))])
def test_applies_the_mirroring_in_the_metadata(tmp_path, axes, corner):
    path = write_clip(tmp_path / "mirror.mp4")
    write_display_matrix(path, *axes)
    frames = decode(path).frames
    assert frames.shape[1:3] == ((48, 64) if axes[0] else (64, 48)) and frame_numbers(frames)[:2] == [0, 1]
    assert frames[0][corner].min() > 235 and frames[0].mean() < 80


def test_reports_the_times_of_a_variable_frame_rate(tmp_path):
    times = [0, 100, 400, 450, 1000]
    clip = decode(write_clip(tmp_path / "phone.mp4", times=times))
    assert frame_numbers(clip.frames) == [0, 1, 2, 3, 4]
    assert clip.timestamps == pytest.approx(np.array(times) / 1000, abs=2e-3)


def test_decodes_a_single_frame(tmp_path):
    clip = decode(write_clip(tmp_path / "still.mp4", count=1))
    assert frame_numbers(clip.frames) == [0] and clip.timestamps.tolist() == [0]


def test_reads_frames_one_by_one_and_ends_the_decoder_early(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    with open_video(path) as opened:
        assert opened.info.frames == len(opened.timestamps) == 12
        seen = [frame_numbers(frame[None])[0] for frame, _ in zip(opened.read([1, 5, 9]), "ab", strict=False)]
        pid = opened.decoder.pid
    assert seen == [1, 5]
    assert not is_running(pid)


def test_works_from_any_directory(tmp_path, monkeypatch):
    write_clip(tmp_path / "clip.mp4")
    (tmp_path / "numpy.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert probe("clip.mp4").frames == 12


# --- hostile files --------------------------------------------------------------------------------------


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_names_the_reason_for_files_that_are_not_videos(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("a text with another name\n" * 50)
    (tmp_path / "list.mp4").write_bytes(b"#EXTM3U\n#\0\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, reason in {
        "missing.mp4": "does not exist",
        "empty.mp4": r"is empty \(0 bytes\)",
        "text.mp4": "is a text file or playlist",
        "list.mp4": "is a text file or playlist",
        "noise.mp4": "it is not a video",
        "pipe.mp4": "is not a file",
    }.items():
        with pytest.raises(UserError, match=f"video {name} .*{reason}"):
            decode(tmp_path / name)
    with pytest.raises(UserError, match=r"sound\.mp4 .*no video stream"):
        decode(write_sound(tmp_path / "sound.mp4"))


@pytest.mark.parametrize("fast_start", [False, True])
def test_refuses_a_truncated_video(tmp_path, fast_start):
    options = {"movflags": "+faststart"} if fast_start else {}
    data = write_clip(tmp_path / "whole.mp4", width=320, height=240, **options).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 7 // 10])
    with pytest.raises(UserError, match=r"cut\.mp4 cannot be decoded: .*cut off"):
        decode(tmp_path / "cut.mp4")


def test_a_header_with_a_million_frames_does_not_take_long(tmp_path):
    data = bytearray(write_clip(tmp_path / "clip.mp4").read_bytes())
    for box, offset in ((b"stts", 12), (b"stsz", 12)):
        struct.pack_into(">I", data, data.index(box) + offset, 1_000_000)
    (tmp_path / "clip.mp4").write_bytes(data)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"clip\.mp4 cannot be decoded"):
        decode(tmp_path / "clip.mp4", timeout=5)
    assert time.monotonic() - started < 10


def replace_worker(tmp_path, monkeypatch, body: str) -> Path:
    """Replace the decoder by another program, which first writes its process id to the returned file."""
    worker, pid = tmp_path / "other_worker.py", tmp_path / "pid"
    worker.write_text(f"import os\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n{body}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(reader, "WORKER", "other_worker")
    return pid


def test_kills_a_decoder_that_hangs_holding_the_gil(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4")
    pid = replace_worker(tmp_path, monkeypatch, "import re; re.match('(a+)+$', 'a' * 60 + 'b')")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"clip\.mp4 cannot be decoded: reading it took longer than 0\.5 s"):
        decode(path, timeout=0.5)
    assert time.monotonic() - started < 60  # the decoder would hang for ever
    assert not is_running(int(pid.read_text()))


def test_a_stop_ends_a_hanging_decoder(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4")
    pid = replace_worker(tmp_path, monkeypatch, "import re; re.match('(a+)+$', 'a' * 60 + 'b')")
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    with pytest.raises(Stopped), open_video(path, timeout=60, stop=stop):
        pass
    assert not is_running(int(pid.read_text()))


def test_a_crashing_decoder_is_a_user_error_and_a_bug_is_not(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4")
    replace_worker(tmp_path, monkeypatch, "os.kill(os.getpid(), 11)")
    with pytest.raises(
        UserError, match=r"clip\.mp4 cannot be decoded: the decoder crashed on it \(SIGSEGV\)"
    ):
        probe(path)
    message = b"ImportError: no av"
    body = f"import struct; os.write(1, struct.pack('>cI', b'B', {len(message)}) + {message!r})"
    replace_worker(tmp_path, monkeypatch, body)
    with pytest.raises(RuntimeError, match="no av"):
        probe(path)
    replace_worker(tmp_path, monkeypatch, "raise ImportError('no av')")
    with pytest.raises(RuntimeError, match="other_worker failed: exit status 1"):
        probe(path)


def test_a_decoder_without_a_parent_ends_by_its_cpu_limit():
    body = "from lib.sandbox.child import _limit_resources\n_limit_resources(1 << 33, 1)\nwhile True: pass"
    assert subprocess.run([sys.executable, "-c", body], timeout=20).returncode == -signal.SIGXCPU


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.webp", "photo.avif", "photo.bmp"])
def test_a_picture_given_as_a_video_is_named_as_one(tmp_path, name):
    Image.new("RGB", (32, 32)).save(tmp_path / name)
    os.rename(tmp_path / name, tmp_path / "clip.mp4")
    with (
        pytest.raises(UserError, match=r"video clip\.mp4 is a picture, not a video"),
        open_video(tmp_path / "clip.mp4"),
    ):
        pass


@pytest.mark.parametrize("name", ["moves.gif", "moves.png"])
def test_an_animation_is_a_clip(tmp_path, name):
    first, *rest = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in (0, 100, 200)]
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=100)
    with open_video(tmp_path / name) as video:
        assert [int(frame[0, 0, 0]) for frame in video.read(range(video.info.frames))] == [0, 100, 200]
