"""Damaged and hostile video files give correct frames or a clear error."""

import struct

import av
import numpy as np
import pytest

from lib.errors import UserError
from lib.sandbox.child import Refused
from lib.video import frame_source
from lib.video.frame_source import Source
from tests.numbered_clips import read_number, write_numbered
from tests.video_decoding import decode, probe

FUZZED = {
    "h264.mp4": {"options": {"x264-params": "bframes=3:b-adapt=0"}},
    "h264.ts": {"options": {"x264-params": "bframes=3:b-adapt=0:open-gop=1"}},
    "hevc.mkv": {"codec": "libx265"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1"},
    "colours.gif": {"codec": "gif", "pixels": "rgb8", "rate": 25},
    "mpeg4.avi": {"codec": "mpeg4"},
    "wmv2.wmv": {"codec": "wmv2"},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2"}, "format": "mpeg"},
}


def test_a_missing_frame_is_named(tmp_path):
    path = write_numbered(tmp_path / "clip.mp4", count=12, gop=1)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    data[packets[7].pos : packets[7].pos + packets[7].size] = bytes(packets[7].size)
    path.write_bytes(data)
    with pytest.raises(UserError, match="frame 7 of 12 cannot be decoded: damaged or cut off"):
        decode(path)
    clip = decode(path, indices=[0, 6, 8, 11])
    assert [read_number(frame) for frame in clip.frames] == [0, 6, 8, 11]


def test_frames_that_change_size_midway_are_refused(tmp_path):
    parts = [
        write_numbered(tmp_path / f"{width}.264", width=width, count=8, format="h264") for width in (64, 80)
    ]
    (tmp_path / "clip.264").write_bytes(b"".join(part.read_bytes() for part in parts))
    for size in (None, (32, 32)):
        with pytest.raises(UserError, match="its frames change size midway"):
            decode(tmp_path / "clip.264", size=size)


def test_frames_that_are_too_large_are_refused_before_they_are_allocated(tmp_path, monkeypatch):
    path = write_numbered(tmp_path / "clip.gif", codec="gif", pixels="rgb8", count=2)
    data = bytearray(path.read_bytes())
    struct.pack_into("<2H", data, 6, 60000, 50000)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"clip\.gif cannot be decoded: frame 0 of 2 cannot be decoded"):
        probe(path)
    monkeypatch.setattr(frame_source, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(Refused, match="its frames of 64x48 are larger than 3,071 pixels"):
        Source(str(write_numbered(tmp_path / "clip.mkv", count=2)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "ffconcat version 1.0\nfile {clip}\n"),
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n"),
        (
            "list.mpd",
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
        ),
    ],
)
def test_files_that_refer_to_others_are_refused(tmp_path, name, text):
    clip = write_numbered(tmp_path / "clip.ts", count=3)
    (tmp_path / name).write_text(text.format(clip=clip.name))
    with pytest.raises(Refused, match="it is not a video"):
        Source(str(tmp_path / name))


def test_an_image_sequence_pattern_is_a_file_name(tmp_path):
    write_numbered(tmp_path / "frame1.jpg", codec="mjpeg", pixels="yuvj420p", count=1, format="mjpeg")
    with pytest.raises(Refused, match="it is not a video"):
        Source(str(tmp_path / "frame%d.jpg"))


@pytest.mark.parametrize("name", FUZZED)
def test_flipped_bits_give_frames_of_the_right_shape_or_a_clear_error(tmp_path, name):
    whole = write_numbered(tmp_path / name, count=24, **FUZZED[name]).read_bytes()
    random = np.random.default_rng(0)
    for attempt in range(3):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 1 + 3 * attempt):
            data[place] ^= 1 << int(random.integers(8))
        (tmp_path / name).write_bytes(data)
        try:
            frames = decode(tmp_path / name, timeout=20).frames
        except UserError:
            continue
        assert frames.ndim == 4 and frames.shape[3] == 3 and len(frames)


@pytest.mark.parametrize("name", FUZZED)
def test_a_truncated_file_gives_its_first_frames_or_a_clear_error(tmp_path, name):
    path = write_numbered(tmp_path / name, **FUZZED[name])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    try:
        clip = decode(path)
    except UserError as error:
        assert "damaged" in str(error) or "cut off" in str(error)
    else:
        # B-frames that would have come after the cut are missing before the last frame.
        numbers = [read_number(frame) for frame in clip.frames[:-1]]
        assert numbers == sorted(set(numbers)) and numbers[0] == 0 and len(numbers) < 60
