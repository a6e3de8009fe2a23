"""Opening data sets: archives are unpacked once and within limits, Hub repositories without code."""

import os
import tarfile
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from lib.datasets import source
from lib.datasets.clips import find_clips
from lib.datasets.source import fetch_hub_dataset, open_data
from lib.errors import UserError
from lib.network import http, partial_file
from lib.video.writer import write_video
from tests.http_host import Host, Served, hub_of
from tests.unit.datasets.test_clips import FORMS, captions, write
from training.clips import Sampling, clip_samples

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# Archives


def zip_of(path: Path, files: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return path


def test_a_folder_is_returned_as_it_is(tmp_path):
    folder = write(tmp_path / "clips", {"a.mp4": b"v"})
    assert open_data(folder, tmp_path / "work") == folder and not (tmp_path / "work").exists()


def test_a_zip_from_a_mac_gives_training_samples(tmp_path):
    grey = np.arange(20, 236, 12, dtype=np.uint8)  # 18 frames, each lighter than the last
    frames = np.broadcast_to(grey[:, None, None, None], (18, 48, 64, 3))
    video = write_video(frames, tmp_path / "v.mp4", fps=16, format="mp4", metadata={}).read_bytes()
    files = {"My clips/Star.MP4": video, "My clips/Star.txt": b"a star", "__MACOSX/My clips/._Star.MP4": b"x"}
    archive = zip_of(tmp_path / "clips.zip", files)
    folder = open_data(archive, tmp_path / "work")
    assert folder.is_relative_to(tmp_path / "work") and folder.name == "clips.zip"
    (clip,), left_out = find_clips(folder)
    assert (clip.name, clip.caption, left_out) == ("My clips/Star.MP4", "a star", [])
    settings = Sampling(
        fps=8, frame_step=8, max_frames=49, width=64, height=48, fit="center", random_crops=1, flip=False,
        skip_frames_start=0, skip_frames_end=0, long_clips="split", seed=0,
    )  # fmt: skip
    (sample,) = clip_samples(clip.path, settings)
    assert sample.frames.mean((1, 2, 3)) == pytest.approx(grey[::2], abs=2)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_of_any_compression_and_name_is_unpacked(tmp_path, mode):
    folder = write(tmp_path / "clips", {"a.mp4": b"v", "a.txt": "a"})
    with tarfile.open(tmp_path / "input.bin", mode) as tar:
        tar.add(folder, "clips")
    assert captions(open_data(tmp_path / "input.bin", tmp_path / "work")) == {"clips/a.mp4": "a"}


def test_the_same_archive_is_unpacked_once_and_another_to_a_folder_of_its_own(tmp_path, monkeypatch):
    archive = zip_of(tmp_path / "clips.zip", {"a.mp4": b"v", "a.txt": b"a"})
    first = open_data(archive, tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(source, "extract_archive", lambda *args, **options: pytest.fail("unpacked again"))
        assert open_data(archive, tmp_path / "work") == first
    zip_of(archive, {"a.mp4": b"v", "a.txt": b"b"})
    second = open_data(archive, tmp_path / "work")
    assert (captions(first), captions(second)) == ({"a.mp4": "a"}, {"a.mp4": "b"})


def test_the_error_for_an_archive_without_clips_names_it(tmp_path):
    folder = open_data(zip_of(tmp_path / "clips.zip", {}), tmp_path / "work")
    with pytest.raises(UserError) as error:
        find_clips(folder)
    assert str(error.value) == f"clips.zip holds no clips: it is empty. {FORMS}"
    folder = open_data(zip_of(tmp_path / "clips.zip", {"x/a.wav": b""}), tmp_path / "work")
    with pytest.raises(UserError) as error:
        find_clips(folder)
    assert str(error.value) == f"clips.zip holds no clips: it has 1 .wav. {FORMS}"


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    zeros, archive = bytes(16 << 20), tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for index in range(65):
            bomb.writestr(f"{index}.mp4", zeros)
    assert archive.stat().st_size < 6_000_000
    with pytest.raises(UserError) as error:
        open_data(archive, tmp_path / "work")
    assert str(error.value) == "bomb.zip unpacks to more than the 1.1 GB that are allowed."
    assert not [path for path in (tmp_path / "work").rglob("*") if not path.is_dir()]


def test_max_bytes_can_lower_the_limit(tmp_path):
    archive = zip_of(tmp_path / "clips.zip", {"a.mp4": os.urandom(5000)})
    with pytest.raises(UserError, match=r"clips\.zip unpacks to more than the 4\.0 kB that are allowed"):
        open_data(archive, tmp_path / "work", max_bytes=4000)


def test_a_zip_that_would_leave_its_folder_is_refused(tmp_path):
    archive = zip_of(tmp_path / "evil.zip", {"a.mp4": b"v", "../../evil.mp4": b"v"})
    with pytest.raises(UserError) as error:
        open_data(archive, tmp_path / "work")
    assert str(error.value) == (
        "evil.zip: '../../evil.mp4' would leave the target folder; the archive is refused."
    )
    assert not list(tmp_path.rglob("*.mp4"))


def test_the_error_for_other_files_lists_the_supported_archives(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(os.urandom(5000))
    with pytest.raises(UserError) as error:
        open_data(tmp_path / "clip.mp4", tmp_path / "work")
    assert str(error.value) == (
        "clip.mp4 is neither a folder nor a zip or tar archive (.zip, .tar, .tar.gz, .tar.bz2, .tar.xz). "
        + FORMS
    )
    with pytest.raises(UserError, match="does not exist"):
        open_data(tmp_path / "gone.zip", tmp_path / "work")


# The Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(partial_file, "CHUNK_BYTES", 50_000)
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    with Host() as host:
        monkeypatch.setenv("HF_ENDPOINT", host.address)
        yield host


def serve(host: Host, files: dict[str, bytes], *, commit: str = COMMIT) -> dict[str, bytes]:
    host.files.update(hub_of("owner/clips", files, commit=commit, kind="datasets"))
    return files


CLIPS = {
    "README.md": b"# clips", "train/a.MP4": b"a" * 120_000, "train/a.txt": b"a ball", "code.py": b"evil",
    "metadata.jsonl": b'{"file_name": "train/a.MP4", "text": "a ball"}\n', ".gitattributes": b"x",
    "train/first.parquet": b"p",
}  # fmt: skip


def test_a_listed_data_set_is_downloaded_with_the_operators_token(tmp_path, hub, monkeypatch):
    serve(hub, CLIPS)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("COGVIDEOX_HUB_REPOSITORIES", "owner/clips")
    fetch_hub_dataset("owner/clips", tmp_path, print)
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, _, headers in hub.requests)


@pytest.mark.parametrize("name", ["owner/clips", "owner/clips@main", f"owner/clips@{COMMIT}"])
def test_a_hub_data_set_is_downloaded_once_and_without_code(tmp_path, hub, monkeypatch, name):
    serve(hub, CLIPS)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    lines: list[str] = []
    folder = fetch_hub_dataset(name, tmp_path, lines.append)
    wanted = ["metadata.jsonl", "train/a.MP4", "train/a.txt"]
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == wanted
    assert all((folder / path).read_bytes() == CLIPS[path] for path in wanted)
    assert lines == [
        "owner/clips: downloading 3 files, 120.1 kB",
        "owner/clips: not downloaded: 1 .md, 1 .py, 1 .parquet",
    ]
    assert not any("Authorization" in headers for _, _, headers in hub.requests)
    assert captions(folder) == {"train/a.MP4": "a ball"}
    hub.requests.clear()
    assert fetch_hub_dataset(name, tmp_path, lines.append) == folder
    assert [path.split("/")[1] for path, _, _ in hub.requests] == ["api"]


def test_an_interrupted_download_is_resumed_and_a_moved_branch_gets_another_folder(tmp_path, hub):
    serve(hub, CLIPS)
    broken = f"/datasets/owner/clips/resolve/{COMMIT}/train/a.txt"
    served = hub.files.pop(broken)
    with pytest.raises(UserError, match="HTTP 404"):
        fetch_hub_dataset("owner/clips", tmp_path, print)
    assert [path.name for path in tmp_path.iterdir()] == ["owner--clips@0123456789abcdef.partial"]
    hub.files[broken] = served
    hub.requests.clear()
    first = fetch_hub_dataset("owner/clips", tmp_path, print)
    assert {path for path, _, _ in hub.requests if "/resolve/" in path} == {broken}
    serve(hub, {**CLIPS, "train/a.txt": b"another"}, commit="f" * 40)
    second = fetch_hub_dataset("owner/clips", tmp_path, print)
    assert (first / "train/a.txt").read_bytes() == b"a ball"
    assert (second / "train/a.txt").read_bytes() == b"another"


def test_a_data_set_without_videos_is_refused_before_downloading(tmp_path, hub):
    serve(hub, {"data/0.parquet": b"p", "README.md": b"r", "notes.txt": b"n"})
    with pytest.raises(UserError) as error:
        fetch_hub_dataset("owner/clips", tmp_path, print)
    assert str(error.value) == (
        "owner/clips on the Hugging Face Hub has no video files: it keeps its data in .parquet files, which "
        f"are not read from the Hub. {FORMS}"
    )
    assert not any("/resolve/" in path for path, _, _ in hub.requests) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["../a.mp4", "/etc/a.mp4", "x/../../a.mp4"])
def test_a_hub_that_lists_files_outside_is_refused(tmp_path, hub, path):
    serve(hub, {"a.mp4": b"v", path: b"evil"})
    with pytest.raises(UserError, match="owner/clips lists a file outside itself; it is refused"):
        fetch_hub_dataset("owner/clips", tmp_path / "work", print)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("name", "meant"),
    [("clips", ""), ("owner/clips@", ""), ("../clips", ""), ("a/../b", ""),
     ("https://huggingface.co/datasets/owner/clips", " Perhaps owner/clips?")],
)  # fmt: skip
def test_the_error_for_an_invalid_name_shows_the_format(tmp_path, name, meant):
    with pytest.raises(UserError) as error:
        fetch_hub_dataset(name, tmp_path, print)
    assert str(error.value) == (
        f"dataset_name={name!r} is not a data set on the Hugging Face Hub: give owner/name, or "
        f"owner/name@revision.{meant}"
    )


@pytest.mark.parametrize(
    ("status", "code", "match"),
    [
        (401, "RepoNotFound", "The Hugging Face Hub has no data set owner/gone, or it is private"),
        (404, "RevisionNotFound", "owner/gone has no revision 'main'"),
        (403, "GatedRepo", "owner/gone is gated"),
    ],
)
def test_refusals_of_the_hub_are_explained(tmp_path, hub, status, code, match):
    answer = Served(b"", status=status, headers={"X-Error-Code": code})
    hub.files["/api/datasets/owner/gone/revision/main"] = answer
    with pytest.raises(UserError, match=match):
        fetch_hub_dataset("owner/gone", tmp_path, print)
