"""Writing mp4, webm and gif: decoded content, metadata, and failures."""

import av
import numpy as np
import pytest
from PIL import Image

from lib.errors import UserError
from lib.video.writer import read_metadata, write_video
from tests.video_decoding import decode, probe

FORMATS = ["mp4", "webm", "gif"]
COLOURS = [(225, 30, 30), (25, 175, 55), (40, 70, 235), (245, 220, 35), (170, 40, 190)]
GREYS = [(8, 8, 8), (128, 128, 128), (248, 248, 248)]


def flat(colour) -> np.ndarray:
    return np.full((48, 64, 3), colour, np.uint8)


def ramp(count: int) -> np.ndarray:
    """Frame i is grey of 10 + 8 i."""
    return np.stack([flat(10 + 8 * index) for index in range(count)])


def moving_disc(background, colour, count=9) -> np.ndarray:
    """An anti-aliased disc that goes right, as the embedded models draw it."""
    y, x = np.mgrid[0:48, 0:64]
    inside = [np.clip(10.5 - np.hypot(x - 12 - 4 * t, y - 24), 0, 1)[..., None] for t in range(count)]
    return np.stack([np.rint(background * (1 - a) + np.array(colour) * a) for a in inside]).astype(np.uint8)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-6, np.mean((one.astype(float) - other) ** 2)))


def frames_by_pyav(path, *, sharp: bool = False) -> np.ndarray:
    """`sharp`: with the chroma interpolation of a player instead of the fastest."""
    from av.video.reformatter import Interpolation

    best = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    with av.open(str(path)) as container:
        return np.stack(
            [
                frame.reformat(format="rgb24", interpolation=best if sharp else None).to_ndarray()
                for frame in container.decode(video=0)
            ]
        )


def gif_delays(path) -> list[int]:
    """Centiseconds per frame."""
    with Image.open(path) as image:
        delays = []
        for index in range(image.n_frames):
            image.seek(index)
            delays.append(round(image.info["duration"] / 10))
        return delays


@pytest.mark.parametrize("format", FORMATS)
def test_saturated_colours_survive_in_every_decoder(tmp_path, format):
    colours = COLOURS + GREYS
    path = write_video(
        np.stack([flat(c) for c in colours]), tmp_path / "clip", fps=8, format=format, metadata={}
    )
    for frames in (decode(path).frames, frames_by_pyav(path)):
        error = np.abs(frames.astype(float) - np.array(colours)[:, None, None])
        assert len(frames) == len(colours) and error.max() <= 4


@pytest.mark.parametrize(("format", "least"), [("mp4", 35), ("webm", 35), ("gif", 29)])
def test_a_detailed_clip_has_a_high_psnr(tmp_path, format, least):
    y, x = np.mgrid[0:48, 0:64]
    waves = [[np.sin(x / 12 + t), np.sin(y / 10 - t), np.sin((x + y) / 16 + t)] for t in np.arange(9) / 4]
    clip = np.rint(128 + 90 * np.moveaxis(waves, 1, -1)).astype(np.uint8)
    path = write_video(clip, tmp_path / "clip", fps=8, format=format, metadata={})
    # dB; a gif has 256 colours for all of these hues.
    assert psnr(decode(path).frames, clip) >= least
    assert format == "gif" or psnr(frames_by_pyav(path, sharp=True), clip) >= 40


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_small_saturated_shape_loses_no_more_than_chroma_subsampling_costs(tmp_path, format, colour):
    clip = moving_disc(8, colour)
    path = write_video(clip, tmp_path / "clip", fps=8, format=format, metadata={})
    # Uncompressed 4:2:0 gives 36.5 dB here with chroma interpolated, 32.7 with it repeated, as in decode.
    assert psnr(frames_by_pyav(path, sharp=True), clip) >= 35.5
    assert psnr(decode(path).frames, clip) >= 32


@pytest.mark.parametrize("format", ["mp4", "webm"])
@pytest.mark.parametrize(
    ("fps", "exact"), [(8, "8"), (24, "24"), (30, "30"), (7.5, "15/2"), (24000 / 1001, "24000/1001")]
)
def test_rate_and_order_are_exact(tmp_path, format, fps, exact):
    path = write_video(ramp(25), tmp_path / "clip", fps=fps, format=format, metadata={})
    clip = decode(path)
    assert np.abs(clip.frames.mean((1, 2, 3)) - (10 + 8 * np.arange(25))).max() < 2
    assert clip.fps == pytest.approx(fps, abs=1e-6)
    assert clip.timestamps == pytest.approx(np.arange(25) / fps, abs=1e-3)
    with av.open(str(path)) as container:
        assert str(container.streams.video[0].average_rate) == exact
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


@pytest.mark.parametrize("fps", [1, 7.5, 8, 12, 16, 24, 30, 60])
def test_gif_delays_add_up_to_the_clips_duration(tmp_path, fps):
    path = write_video(ramp(25), tmp_path / "clip.gif", fps=fps, format="gif", metadata={})
    delays = gif_delays(path)
    assert len(delays) == 25
    assert abs(sum(delays) - 100 * 25 / fps) <= 1
    assert max(delays) - min(delays) <= 1
    with Image.open(path) as image:
        assert image.info["loop"] == 0  # for ever


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("levels", [[77], [77, 77, 77, 90, 90, 77]])
def test_single_and_repeated_frames_are_all_kept(tmp_path, format, levels):
    clip = np.stack([flat(level) for level in levels])
    path = write_video(clip, tmp_path / "clip", fps=8, format=format, metadata={})
    decoded = decode(path)
    assert [round(frame.mean()) for frame in decoded.frames] == pytest.approx(levels, abs=1)
    assert probe(path).duration == pytest.approx(len(levels) / 8, abs=0.011)
    if format == "gif":
        assert len(gif_delays(path)) == len(levels)


def test_a_gif_of_few_colours_is_exact_and_one_of_many_has_no_speckle(tmp_path):
    clip = np.stack([flat(colour) for colour in COLOURS])
    path = write_video(clip, tmp_path / "few.gif", fps=8, format="gif", metadata={})
    assert (decode(path).frames == clip).all()

    clip = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3)).astype(np.uint8)
    clip[:, 10:40, 10:40] = COLOURS[0]
    path = write_video(clip, tmp_path / "many.gif", fps=8, format="gif", metadata={})
    patch = decode(path).frames[:, 10:40, 10:40]
    assert len(np.unique(patch.reshape(-1, 3), axis=0)) == 1
    assert np.abs(patch[0, 0, 0].astype(int) - COLOURS[0]).max() <= 8


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_survives_any_prompt(tmp_path, format):
    metadata = {
        "model": "tiny-t2v",
        "prompt": 'a "red" circle\nGröße\t漢字 \\ 🟥 \u0000 \ud800 <&>; =\r\n' + "words " * 2000,
        "seed": "18446744073709551615",
        "empty": "",
    }
    path = write_video(ramp(2), tmp_path / "clip", fps=8, format=format, metadata=metadata)
    assert read_metadata(path) == metadata
    assert probe(path).frames == 2


def test_ffprobe_finds_the_prompt(tmp_path):
    for format in ("mp4", "webm"):
        path = write_video(ramp(2), tmp_path / "clip", fps=8, format=format, metadata={"prompt": "ein Bär"})
        with av.open(str(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
        assert tags["comment"] == '{"prompt": "ein Bär"}'


def test_files_of_other_programs_have_no_metadata(tmp_path):
    with av.open(str(tmp_path / "other.mp4"), "w") as container:
        container.metadata["comment"] = "holiday"
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(flat(9), format="rgb24")))
        container.mux(stream.encode(None))
    assert read_metadata(tmp_path / "other.mp4") == {}
    Image.new("RGB", (8, 8)).save(tmp_path / "other.gif")
    assert read_metadata(tmp_path / "other.gif") == {}


@pytest.mark.parametrize("format", FORMATS)
def test_same_frames_and_metadata_give_the_same_bytes(tmp_path, format):
    shape = (4, 48, 64, 3) if format == "gif" else (12, 144, 176, 3)  # enough for several threads
    clip = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    paths = [tmp_path / name for name in ("one", "two", "three")]
    for path, frames in zip(paths, (clip, iter(clip), list(clip[:, ::-1])), strict=True):
        write_video(frames, path, fps=8, format=format, metadata={"seed": "1"})
    one, two, three = (path.read_bytes() for path in paths)
    assert one == two != three


def test_an_mp4_can_be_played_while_it_downloads(tmp_path):
    data = write_video(ramp(3), tmp_path / "clip.mp4", fps=8, format="mp4", metadata={}).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_encodes_frames_as_they_arrive(tmp_path, format):
    sizes = []

    def slow_frames():
        for _ in range(80):
            sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
            yield np.random.default_rng(len(sizes)).integers(0, 256, (144, 176, 3)).astype(np.uint8)

    path = write_video(slow_frames(), tmp_path / "clip", fps=8, format=format, metadata={})
    assert sizes[-1] > 100_000  # much was on disk before the last frame was made
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip"] and probe(path).frames == 80


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("failure", [RuntimeError("decoder failed"), KeyboardInterrupt()])
def test_a_failure_leaves_no_partial_file_and_keeps_the_old_one(tmp_path, format, failure):
    def frames():
        yield from ramp(5)
        raise failure

    (tmp_path / "clip").write_text("earlier result")
    with pytest.raises(type(failure)):
        write_video(frames(), tmp_path / "clip", fps=8, format=format, metadata={})
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["earlier result"]


def test_odd_sizes_are_refused_for_mp4_alone(tmp_path):
    clip = np.stack([np.full((47, 63, 3), 100 + index, np.uint8) for index in range(3)])
    with pytest.raises(UserError, match="must be even, not 63x47: use 62x46 or webm"):
        write_video(clip, tmp_path / "clip", fps=8, format="mp4", metadata={})
    assert not list(tmp_path.iterdir())
    for format in ("webm", "gif"):
        path = write_video(clip, tmp_path / "clip", fps=8, format=format, metadata={})
        assert decode(path).frames.shape == clip.shape


@pytest.mark.parametrize("format", FORMATS)
def test_refuses_invalid_frames_and_rates(tmp_path, format):
    def write(frames, fps=8):
        write_video(frames, tmp_path / "clip", fps=fps, format=format, metadata={})

    with pytest.raises(ValueError, match="no frames"):
        write([])
    with pytest.raises(ValueError, match="frame 0 is float32"):
        write(ramp(2).astype(np.float32))
    with pytest.raises(ValueError, match="frame 1 is uint8"):
        write([flat(1), flat(1)[:40]])
    for fps in (0, -8, float("nan"), float("inf")):
        with pytest.raises(UserError, match="above 0"):
            write(ramp(2), fps)
    assert not list(tmp_path.iterdir())
