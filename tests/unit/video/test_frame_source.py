"""Frames by number, from clips with the frame numbers in their pixels."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lib.errors import UserError
from lib.video import frame_source
from lib.video.frame_source import Source
from lib.video.reader import VideoInfo, open_video
from lib.video.writer import write_video
from tests.numbered_clips import numbered_frame, read_number, write_numbered
from tests.video_decoding import decode, probe

B_FRAMES = {"x264-params": "bframes=3:b-adapt=0"}
NO_B_FRAMES = {"x264-params": "bframes=0"}
OPEN_GOP = {"x264-params": "bframes=3:b-adapt=0:open-gop=1"}
HEVC_OPEN_GOP = {"x265-params": "log-level=none:pools=1:bframes=3:open-gop=1:keyint=12:min-keyint=12"}
REFRESH = {"x264-params": "intra-refresh=1:bframes=0:scenecut=0"}
IRREGULAR = [0, 100, 130, 400, 450, 1000, 1010, 1500, 3000, 3033, 3066, 3100, 3500, 4000, 4004, 4500]

CLIPS = {
    "h264.mp4": {"options": NO_B_FRAMES},
    "h264-one-gop.mp4": {"options": NO_B_FRAMES, "gop": 250},
    "h264-b.mp4": {"options": B_FRAMES},
    "h264-b-one-gop.mp4": {"options": B_FRAMES, "gop": 250},
    "h264-open-gop.mp4": {"options": OPEN_GOP},
    "h264-open-gop.ts": {"options": OPEN_GOP},
    "h264-refresh.ts": {"options": REFRESH},
    "h264-interlaced.ts": {"options": {"x264-params": "tff=1"}},
    "h264.mkv": {},
    "h264.flv": {},
    "h264.avi": {},
    "h264.mpg": {"format": "mpeg"},
    "h264-raw.264": {"format": "h264"},
    "h264-all-key.mp4": {"gop": 1},
    "hevc-open-gop.mp4": {"codec": "libx265", "options": HEVC_OPEN_GOP},
    "hevc-open-gop.mkv": {"codec": "libx265", "options": HEVC_OPEN_GOP},
    "hevc-10-bit.mp4": {"codec": "libx265", "pixels": "yuv420p10le"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1"},
    "av1.mkv": {"codec": "libsvtav1"},
    "colours.gif": {"codec": "gif", "pixels": "rgb8", "rate": 25},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4-b.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4-b.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "wmv2.wmv": {"codec": "wmv2"},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}, "format": "mpeg"},
    "mpeg1.mpg": {"codec": "mpeg1video", "format": "mpeg"},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"bf": "2"}},
    "ffv1.mkv": {"codec": "ffv1"},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "irregular.mp4": {"times": IRREGULAR},
    "irregular.mkv": {"times": IRREGULAR},
    "odd.mkv": {"width": 63, "height": 47, "pixels": "yuv444p"},
    "narrow.mp4": {"width": 16, "height": 64},
    "rows-of-48.mp4": {"width": 48, "height": 64},
    "one.mp4": {"count": 1},
}


def index_lists(count: int) -> list[list[int]]:
    random = np.random.default_rng(count)
    gaps = sorted(random.choice(count, min(count, 7), replace=False).tolist())
    lists = [range(count), range(0, count, 3), gaps, [count - 1], [0, count - 1], [count // 2, count - 1]]
    return [list(indices) for indices in lists]


def numbers_in(path: Path, indices: list[int]) -> list[int]:
    source = Source(str(path))
    return [read_number(source.frame(index).to_ndarray(format="rgb24")) for index in indices]


@pytest.mark.parametrize("name", CLIPS)
def test_any_increasing_indices_give_these_frames(tmp_path, name):
    path = write_numbered(tmp_path / name, **CLIPS[name])
    times = CLIPS[name].get("times") or np.arange(CLIPS[name].get("count", 60)) * 1000 / 30
    times = np.array(times) / 1000 * (30 / 25 if name.endswith((".gif", ".264")) else 1)
    source = Source(str(path))
    assert source.times == pytest.approx(times, abs=2e-3)
    assert source.duration == pytest.approx(times[-1] + (1 / 30 if len(times) > 1 else 0), abs=0.5)
    for indices in index_lists(len(times)):
        assert numbers_in(path, indices) == indices


def test_frames_with_gaps_are_read_through_the_decoding_process(tmp_path):
    frames = np.stack([numbered_frame(number) for number in range(20)])
    path = write_video(frames, tmp_path / "clip.mp4", fps=30, format="mp4", metadata={})
    wanted = [0, 3, 7, 11, 15]
    clip = decode(path, indices=wanted)
    assert [read_number(frame) for frame in clip.frames] == wanted
    assert clip.timestamps == pytest.approx(np.array(wanted) / 30)
    assert probe(path) == VideoInfo(20, 30.0, 64, 48, pytest.approx(20 / 30))


def test_distant_frames_are_reached_by_seeking_and_near_ones_by_decoding(tmp_path, monkeypatch):
    path = write_numbered(tmp_path / "clip.mp4", count=300, gop=20)
    packets, whole = [], frame_source.Source._decoded

    def counted(source, stream_packets):
        yield from whole(source, (packets.append(packet) or packet for packet in stream_packets))

    monkeypatch.setattr(Source, "_decoded", counted)
    source = Source(str(path))
    packets.clear()
    assert read_number(source.frame(281).to_ndarray(format="rgb24")) == 281
    assert len(packets) < 30
    packets.clear()
    assert read_number(source.frame(286).to_ndarray(format="rgb24")) == 286
    assert len(packets) <= 5


def test_wrongly_marked_key_frames_do_not_matter(tmp_path):
    path = write_numbered(tmp_path / "clip.mp4", gop=250, options=NO_B_FRAMES)
    data = path.read_bytes()
    assert data.count(b"stss") == 1
    path.write_bytes(data.replace(b"stss", b"free"))  # without this box every frame counts as a key frame
    assert numbers_in(path, [5, 31, 59]) == [5, 31, 59]


@pytest.mark.parametrize("options", [NO_B_FRAMES, B_FRAMES])
def test_frames_cut_by_an_edit_list_are_not_counted(tmp_path, options):
    path = write_numbered(tmp_path / "clip.mp4", options=options)
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12  # after version, flags and number of entries: duration, media time
    with av.open(str(path)) as container:
        ticks = int(Fraction(1, 30) / container.streams.video[0].time_base)
    start = struct.unpack_from(">i", data, entry + 4)[0]
    struct.pack_into(">i", data, entry + 4, start + 17 * ticks)
    path.write_bytes(data)
    source = Source(str(path))
    assert len(source.times) == 43 and source.times[:2] == pytest.approx([0, 1 / 30])
    assert numbers_in(path, [0, 1, 20, 42]) == [17, 18, 37, 59]


def test_a_stream_cut_at_its_start_counts_from_its_first_complete_frame(tmp_path):
    path = write_numbered(tmp_path / "clip.ts", options=OPEN_GOP, count=60, gop=12)
    with av.open(str(path)) as container:
        second_gop = [packet.pos for packet in container.demux(video=0) if packet.is_keyframe][1]
    path.write_bytes(path.read_bytes()[second_gop - 188 * 2 :])
    count = len(Source(str(path)).times)
    assert numbers_in(path, list(range(count))) == list(range(60 - count, 60)) and count == 48


def test_concatenated_recordings_are_counted_through(tmp_path):
    later = [2016 + 40 * index for index in range(20)]
    parts = [write_numbered(tmp_path / "a.ts", count=20, times=later, options=B_FRAMES)]
    parts += [write_numbered(tmp_path / "b.ts", count=20, times=[pts - 500 for pts in later])]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert numbers_in(path, list(range(40))) == [*range(20), *range(20)]
    assert numbers_in(path, [3, 25, 39]) == [3, 5, 19]
    assert (np.diff(Source(str(path)).times) > 0).all()


def write_with_sound(path: Path, count: int) -> Path:
    """Write a numbered clip with an interleaved sound track."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 12
        sound = container.add_stream("aac", rate=44100, layout="mono")
        for number in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")))
            samples = np.zeros((1, 1470), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, number * 1470
            container.mux(sound.encode(frame))
        container.mux(stream.encode(None))
        container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_a_sound_track_changes_nothing(tmp_path, name):
    path = write_with_sound(tmp_path / name, 60)
    assert len(Source(str(path)).times) == 60
    for indices in index_lists(60):
        assert numbers_in(path, indices) == indices


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    whole = write_numbered(tmp_path / "whole.webm", codec="libvpx", count=10, gop=1)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "clip.webm"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if not packet.size:
                continue
            hidden = av.Packet(bytes([bytes(packet)[0] & ~0x10]) + bytes(packet)[1:])
            hidden.pts = hidden.dts = packet.pts + 10
            hidden.time_base, hidden.is_keyframe = packet.time_base, True
            packet.stream = hidden.stream = stream
            target.mux(packet)
            target.mux(hidden)
    assert len(Source(str(tmp_path / "clip.webm")).times) == 10
    assert numbers_in(tmp_path / "clip.webm", [0, 1, 5, 9]) == [0, 1, 5, 9]


def write_streams(path: Path, *streams: dict) -> Path:
    """Write several video streams of given size, number of frames and disposition."""
    with av.open(str(path), "w") as container:
        for options in streams:
            stream = container.add_stream(options.get("codec", "libx264"), rate=10)
            stream.width, stream.height = options["size"]
            stream.pix_fmt = "yuvj420p" if options.get("codec") == "mjpeg" else "yuv420p"
            stream.disposition = getattr(av.stream.Disposition, options.get("disposition", "dub"))
            options["stream"] = stream
        for options in streams:
            for pts in range(options["count"]):
                frame = av.VideoFrame.from_ndarray(numbered_frame(pts, *options["size"]), format="rgb24")
                frame.pts, frame.time_base = pts, Fraction(1, 10)
                container.mux(options["stream"].encode(frame))
            container.mux(options["stream"].encode(None))
    return path


def test_cover_art_is_not_the_video(tmp_path):
    cover = {"codec": "mjpeg", "size": (640, 480), "count": 1, "disposition": "attached_pic"}
    path = write_streams(tmp_path / "clip.mp4", cover, {"size": (64, 48), "count": 12})
    assert probe(path) == VideoInfo(12, pytest.approx(10), 64, 48, pytest.approx(1.2))
    with pytest.raises(UserError, match="it has no video stream"):
        probe(write_streams(tmp_path / "song.mp4", cover))


def test_the_default_one_of_several_video_streams_is_read(tmp_path):
    small = {"size": (64, 48), "count": 12}
    large = {"size": (320, 240), "count": 12, "disposition": "default"}
    path = write_streams(tmp_path / "clip.mkv", small, large)
    clip = decode(path, indices=[3, 7])
    assert clip.frames.shape == (2, 240, 320, 3)
    assert [read_number(frame) for frame in clip.frames] == [3, 7]


def peak_of_worker(path: Path, indices: list[int]) -> int:
    """Return the peak memory of the decoding process in kB, read before the last three frames."""
    with open_video(path) as opened:
        for index, _ in zip(indices, opened.read(indices), strict=True):
            if index == indices[-4]:
                status = Path(f"/proc/{opened.decoder.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_clips_length(tmp_path):
    short = write_numbered(tmp_path / "short.mp4", count=40, gop=20, width=640, height=480)
    long = repeat_packets(short, tmp_path / "long.mp4", times=100)
    assert len(Source(str(long)).times) == 4000
    first = peak_of_worker(short, [0, 10, 20, 36, 37, 38, 39])
    second = peak_of_worker(long, [0, 1000, 2000, 3996, 3997, 3998, 3999])
    assert second < 1.1 * first


def repeat_packets(path: Path, target: Path, *, times: int) -> Path:
    """Write the same encoded clip repeatedly into one long stream."""
    with av.open(str(path)) as source, av.open(str(target), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        length = round(len(packets) / source.streams.video[0].average_rate / packets[0].time_base)
        data = [(bytes(p), p.pts, p.dts, p.duration, p.is_keyframe, p.time_base) for p in packets]
        for round_ in range(times):
            for payload, pts, dts, duration, is_key, time_base in data:
                packet = av.Packet(payload)
                packet.pts, packet.dts = pts + round_ * length, dts + round_ * length
                packet.duration, packet.time_base, packet.is_keyframe = duration, time_base, is_key
                packet.stream = stream
                container.mux(packet)
    return target
