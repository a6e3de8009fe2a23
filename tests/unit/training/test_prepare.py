"""A run's data set: unpacked while it is needed, or kept; both can be stopped."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.network import partial_file
from lib.storage.lock import lock
from tests import training_factory as factory
from tests.clips_factory import zip_with
from tests.http_host import Host, hub_of
from training.prepare import found_clips

COMMIT = "0123456789abcdef" * 2 + "01234567"
FOLDER = "owner--clips@0123456789abcdef"
FILES = {"a.mp4": b"a" * 120_000, "a.txt": b"a ball", "b.mp4": b"b" * 120_000, "b.txt": b"a star"}
ALONE = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path) -> Path:
    """Where data sets of the Hub stay."""
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(partial_file, "CHUNK_BYTES", 50_000)
    return tmp_path / "cache" / "datasets"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with Host(hub_of("owner/clips", FILES, commit=COMMIT, kind="datasets")) as host:
        monkeypatch.setenv("HF_ENDPOINT", host.address)
        yield host


def captions(work: Path, *, stop: threading.Event | None = None, report=print, **settings) -> dict[str, str]:
    """What found_clips finds; the files are there inside the block."""
    config = factory.config(**settings).data
    with found_clips(config, work, ALONE, stop=stop or threading.Event(), report=report) as (clips, _):
        assert all(clip.path.is_file() for clip in clips)
        return {clip.name: clip.caption for clip in clips}


def from_hub(work: Path, **options) -> dict[str, str]:
    return captions(work, input_videos=None, dataset_name="owner/clips", **options)


def downloads(host: Host) -> list[str]:
    return sorted({path.rpartition("/")[2] for path, _, _ in host.requests if "/resolve/" in path})


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


def test_an_unpacked_archive_is_removed_after_use(tmp_path, kept):
    archive = zip_with(tmp_path / "clips.zip", FILES)
    found = captions(tmp_path / "run" / "data", input_videos=str(archive))
    assert found == {"a.mp4": "a ball", "b.mp4": "a star"}
    assert not (tmp_path / "run" / "data").exists() and not kept.exists()


def test_a_data_set_of_the_hub_is_kept_for_resumed_and_other_runs(tmp_path, kept, hub):
    assert from_hub(tmp_path / "one" / "data") == {"a.mp4": "a ball", "b.mp4": "a star"}
    assert downloads(hub) == sorted(FILES)
    assert [path.name for path in kept.iterdir()] == [FOLDER]
    hub.requests.clear()
    for run in ("one", "another"):
        assert from_hub(tmp_path / run / "data") == {"a.mp4": "a ball", "b.mp4": "a star"}
    assert downloads(hub) == []


def test_a_failed_download_continues_in_the_next_run(tmp_path, kept, hub):
    lost = f"/datasets/owner/clips/resolve/{COMMIT}/b.mp4"
    served = hub.files.pop(lost)
    with pytest.raises(UserError, match="nothing at this address"):
        from_hub(tmp_path / "one" / "data")
    assert sorted(path.name for path in (kept / f"{FOLDER}.partial").iterdir()) == ["a.mp4", "a.txt"]
    hub.files[lost] = served
    hub.requests.clear()
    assert from_hub(tmp_path / "two" / "data") == {"a.mp4": "a ball", "b.mp4": "a star"}
    assert downloads(hub) == ["b.mp4", "b.txt"]


def test_a_stalled_download_can_be_cancelled_and_continues_in_the_next_run(tmp_path, hub):
    video = hub.files[f"/datasets/owner/clips/resolve/{COMMIT}/b.mp4"]
    video.stall_at = 0
    stop, ended = threading.Event(), []

    def download() -> None:
        with pytest.raises(Stopped):
            from_hub(tmp_path / "one" / "data", stop=stop)
        ended.append(hub.released.is_set())

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    until(lambda: "b.mp4" in downloads(hub))
    stop.set()
    thread.join(20)
    assert ended == [False]
    video.stall_at = None
    hub.requests.clear()
    assert from_hub(tmp_path / "two" / "data") == {"a.mp4": "a ball", "b.mp4": "a star"}
    assert downloads(hub) == ["b.mp4", "b.txt"]


def test_a_run_that_waits_for_anothers_download_can_be_cancelled(tmp_path, kept, hub):
    stop, lines = threading.Event(), []

    def report(line: str) -> None:
        lines.append(line)
        stop.set()

    with lock(kept / FOLDER, print), pytest.raises(Stopped):
        from_hub(tmp_path / "data", stop=stop, report=report)
    assert lines == [f"{FOLDER}: another process is downloading it; waiting for that"]
    assert downloads(hub) == []


def test_clips_without_a_caption_are_left_out_and_autocaption_is_named(tmp_path):
    archive, lines = zip_with(tmp_path / "clips.zip", FILES | {"b.txt": b" "}), []
    assert captions(tmp_path / "data", input_videos=str(archive), report=lines.append) == {"a.mp4": "a ball"}
    assert lines == [
        "left out: b.mp4: no caption: b.txt is empty; write what the clip shows into it",
        "With autocaption=true a model captions the clips that have no caption.",
    ]
    archive = zip_with(tmp_path / "none.zip", {"b.mp4": b"b"})
    with pytest.raises(UserError, match=r"holds no clips.* With autocaption=true a model captions the clips"):
        captions(tmp_path / "data", input_videos=str(archive))


def test_with_autocaption_clips_without_a_caption_are_kept(tmp_path):
    archive, lines = zip_with(tmp_path / "clips.zip", FILES | {"b.txt": b" "}), []
    given = {"input_videos": str(archive), "autocaption": True, "trigger_word": "TOK"}
    assert captions(tmp_path / "data", **given, report=lines.append) == {"a.mp4": "a ball", "b.mp4": ""}
    assert lines == []


def test_a_cancelled_run_does_not_unpack(tmp_path):
    archive, stop = zip_with(tmp_path / "clips.zip", FILES), threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        captions(tmp_path / "run" / "data", input_videos=str(archive), stop=stop)
    assert not (tmp_path / "run" / "data").exists()


def test_a_cache_folder_that_cannot_be_written_is_an_error(tmp_path, hub):
    (tmp_path / "cache").write_bytes(b"no folder")
    with pytest.raises(UserError, match=f"cache/datasets/{FOLDER} could not be written"):
        from_hub(tmp_path / "data")
