"""Captioning data sets: what is kept, what is captioned again, and what is left out."""

import json
import os
import tarfile
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lib.cancellation import Stopped
from lib.caption.captioner import Captioner
from lib.caption.dataset import captioned_dataset
from lib.caption.journal import Journal, Row
from lib.caption.request import DatasetRequest
from lib.commands.caption_paths import resolve_paths
from lib.commands.caption_run import caption_dataset
from lib.datasets.clips import Clip, LeftOut, find_clips
from lib.distributed.accelerate_processes import AccelerateProcesses
from lib.errors import UserError
from lib.predictors.caption_dataset import KEPT_JOURNALS, DatasetCaptionPredictor, resumable_journal
from lib.predictors.start import start_caption_dataset
from lib.storage.archive import extract_archive
from lib.storage.lock import lock
from lib.weights.cache import cache_folder
from tests.caption_factory import write_captioner
from tests.clips_factory import write_clips, zip_of, zip_with

QUICK = {"max_new_tokens": 6}
NAMES = ["clip 1.mp4", "deep/über.mp4", "deep/same.mp4", "deep/same.MP4", "deep/er/x.mp4"]


class Metrics(dict):
    def record_metric(self, name: str, value: object) -> None:
        self[name] = value


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("captioner") / "nonsense", ends=False)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[bytes]:
    folder = write_clips(tmp_path_factory.mktemp("videos"), len(NAMES))
    return [path.read_bytes() for path in sorted(folder.glob("*.mp4"))]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, model, tmp_path) -> None:
    monkeypatch.setenv("COGVIDEOX_MODEL", str(model))
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def predictor(model) -> DatasetCaptionPredictor:
    os.environ["COGVIDEOX_MODEL"] = str(model)
    try:
        return start_caption_dataset()
    finally:
        del os.environ["COGVIDEOX_MODEL"]


@pytest.fixture
def clips(tmp_path, videos) -> Path:
    folder = tmp_path / "clips"
    for name, content in zip(NAMES, videos, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Record the size of every batch that is captioned."""
    calls: list[int] = []
    original = Captioner.caption

    def counted(self, clips, *arguments, **options):
        answer = original(self, clips, *arguments, **options)
        calls.append(len(clips))
        return answer

    monkeypatch.setattr(Captioner, "caption", counted)
    return calls


def packed(predictor: DatasetCaptionPredictor, archive: Path, target: Path, **inputs) -> tuple[Path, Metrics]:
    """Run the predictor and unpack its zip; return the folder and the metrics."""
    metrics = Metrics()
    path = predictor(metrics, input_videos=archive, **(QUICK | inputs))
    return extract_archive(path, target), metrics


def local(
    source: Path, output: Path | None = None, *, stop: threading.Event | None = None, **inputs
) -> list[str]:
    """Run script/caption's function in this process; return its report."""
    lines: list[str] = []
    caption_dataset(
        resolve_paths(source, output), QUICK | inputs, processes=AccelerateProcesses(),
        stop=stop or threading.Event(), report=lines.append,
    )  # fmt: skip
    return lines


def captions(folder: Path) -> dict[str, str]:
    return {clip.name: clip.caption for clip in find_clips(folder)[0]}


def errors(folder: Path) -> dict[str, str]:
    lines = (folder / "errors.jsonl").read_text().splitlines()
    return {row["file_name"]: row["error"] for row in map(json.loads, lines)}


def journals() -> list[Path]:
    return sorted((cache_folder() / "captions").iterdir())


# Results


def test_every_clip_is_captioned_and_no_journal_is_left_behind(predictor, clips, tmp_path):
    out, metrics = packed(predictor, zip_of(clips, tmp_path / "in.zip"), tmp_path / "out")
    found = captions(out)
    assert sorted(found) == sorted(NAMES)
    assert len(set(found.values())) == len(NAMES), "different clips, different captions"
    assert all((out / name).read_bytes() == (clips / name).read_bytes() for name in NAMES)
    assert not (out / "errors.jsonl").exists()
    for name in ("metadata.jsonl", "prompts.txt", "videos.txt"):
        assert (out / name).is_file()
    (out / "metadata.jsonl").unlink()
    assert captions(out) == found
    (out / "videos.txt").unlink()
    assert captions(out) == found
    assert {key: metrics[key] for key in ("model", "device", "clips", "captioned", "kept", "failed")} == {
        "model": "nonsense", "device": "cpu", "clips": 5, "captioned": 5, "kept": 0, "failed": 0
    }  # fmt: skip
    assert metrics["seconds_per_clip"] > 0
    assert journals() == []


def test_captions_do_not_depend_on_batch_size_archive_or_entry_point(predictor, clips, tmp_path):
    with tarfile.open(tmp_path / "in.tar.gz", "w:gz") as tar:
        tar.add(clips, "inner")
    whole, _ = packed(predictor, zip_of(clips, tmp_path / "in.zip"), tmp_path / "whole", batch_size=8)
    single, _ = packed(predictor, tmp_path / "in.tar.gz", tmp_path / "single", batch_size=1)
    assert captions(whole) == {name.removeprefix("inner/"): text for name, text in captions(single).items()}
    local(clips, tmp_path / "local", batch_size=2)
    assert captions(tmp_path / "local") == captions(whole)
    local(clips)
    assert captions(clips) == captions(whole)


def test_existing_captions_are_kept_and_new_ones_get_the_trigger_word(predictor, clips, tmp_path, asked):
    (clips / "clip 1.txt").write_text("my own words")
    (clips / "deep" / "metadata.jsonl").write_text('{"file_name": "er/x.mp4", "text": "a box"}\n')
    archive = zip_of(clips, tmp_path / "in.zip")
    affixes = {"trigger_word": "TOK", "caption_prefix": "film of", "caption_suffix": ", grainy"}
    out, metrics = packed(predictor, archive, tmp_path / "out", **affixes)
    found = captions(out)
    assert (found["clip 1.mp4"], found["deep/er/x.mp4"]) == ("my own words", "a box")
    new = [found[name] for name in NAMES[1:4]]
    assert all(text.startswith("film of TOK ") and text.endswith(", grainy") for text in new)
    assert (metrics["captioned"], metrics["kept"], sum(asked)) == (3, 2, 3)
    assert not (out / "deep" / "metadata.jsonl").exists()
    replaced, metrics = packed(
        predictor, archive, tmp_path / "replaced", existing_captions="replace", **affixes
    )
    assert (metrics["captioned"], metrics["kept"]) == (5, 0)
    assert all(text.startswith("film of TOK ") for text in captions(replaced).values())


def test_without_videos_the_zip_contains_only_caption_files(predictor, clips, tmp_path):
    path = predictor(
        Metrics(), input_videos=zip_of(clips, tmp_path / "in.zip"), include_videos=False, **QUICK
    )
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.lower().endswith(".mp4")]
        assert archive.read("videos.txt").decode().splitlines() == sorted(NAMES)


# Bad clips


def add_bad_files(clips: Path) -> None:
    """Add four files that are not clips, and a row without a file."""
    (clips / "text.mp4").write_text("I am no video")
    (clips / "empty.mp4").touch()
    (clips / "broken.mp4").write_bytes((clips / NAMES[0]).read_bytes()[:900])
    (clips / "still.jpg").write_bytes(b"G" * 188)
    (clips / "deep" / "metadata.jsonl").write_text('{"file_name": "gone.mp4", "text": "x"}\n')


def test_each_bad_file_is_in_errors_jsonl_alone(predictor, clips, tmp_path):
    add_bad_files(clips)
    out, metrics = packed(predictor, zip_of(clips, tmp_path / "in.zip"), tmp_path / "out")
    failures = errors(out)
    assert failures.pop("broken.mp4").startswith("video broken.mp4 cannot be decoded: ")
    assert failures == {
        "text.mp4": "video text.mp4 is a text file or playlist, not a video",
        "empty.mp4": "video empty.mp4 is empty (0 bytes)",
        "still.jpg": "it is a picture, not a video",
        "deep/metadata.jsonl, line 1": "gone.mp4: there is no such file in the data set",
    }
    assert sorted(captions(out)) == sorted(NAMES)
    assert not {"text.mp4", "text.txt", "empty.mp4", "broken.mp4", "still.jpg"} & set(os.listdir(out))
    assert (metrics["clips"], metrics["captioned"], metrics["failed"]) == (10, 5, 5)


def test_on_bad_clip_stop_lists_bad_clips_and_keeps_what_is_done(predictor, clips, tmp_path, asked):
    (clips / "clip 2.mp4").write_text("I am no video")
    archive = zip_of(clips, tmp_path / "in.zip")
    message = (
        "1 clip cannot be captioned, and on_bad_clip is stop:\n  clip 2.mp4: video clip 2.mp4 is a text file"
    )
    with pytest.raises(UserError) as refused:
        predictor(Metrics(), input_videos=archive, on_bad_clip="stop", batch_size=1, **QUICK)
    assert str(refused.value).startswith(message)
    assert asked == [1]
    _, metrics = packed(predictor, archive, tmp_path / "out")
    assert asked == [1, 4], "the clip before it is not captioned again"
    assert (metrics["captioned"], metrics["failed"]) == (5, 1)
    (clips / "still.jpg").touch()
    with pytest.raises(UserError, match=r"(?s)on_bad_clip is stop:\n  still\.jpg: it is a picture"):
        local(clips, tmp_path / "local", on_bad_clip="stop")
    assert asked == [1, 4] and not (tmp_path / "local").exists()


def test_an_archive_without_usable_clips_is_refused(predictor, tmp_path):
    bad = zip_with(tmp_path / "bad.zip", {"a.mp4": b"I am no video"})
    with pytest.raises(UserError, match=r"no clip can be captioned:\n  a\.mp4: video a\.mp4 is a text file"):
        predictor(Metrics(), input_videos=bad, **QUICK)
    for members, message in (({}, "it is empty"), ({"a.txt": b"a"}, r"it has 1 \.txt")):
        archive = zip_with(tmp_path / "none.zip", members)
        with pytest.raises(UserError, match=rf"none\.zip holds no clips: {message}\."):
            predictor(Metrics(), input_videos=archive, **QUICK)
    with pytest.raises(UserError, match="is a folder; send a zip or tar of it, or use script/caption"):
        predictor(Metrics(), input_videos=tmp_path, **QUICK)
    assert list(predictor.scratch.folder.iterdir()) == []
    assert journals() == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"batch_size": 65}, "batch_size=65 is out of range: 1 to 64"),
        ({"existing_captions": "mend"}, "existing_captions=mend is unknown; allowed are keep, replace"),
        ({"on_bad_clip": "cry"}, "on_bad_clip=cry is unknown; allowed are skip, stop"),
        ({"prompt": " "}, "prompt is empty; ask something, such as 'Please describe this video in detail.'"),
    ],
)
def test_invalid_inputs_are_refused(inputs, message):
    with pytest.raises(UserError) as refused:
        DatasetRequest.from_inputs(inputs)
    assert str(refused.value) == message


def test_captions_that_were_cut_off_are_counted():
    clips = [Clip(path=Path(name), name=name, caption="") for name in ("a", "b")]
    rows = [Row(file_name=name, status="captioned", caption="x", finished=name == "a") for name in ("a", "b")]
    request = DatasetRequest.from_inputs({})
    assert captioned_dataset(clips, [LeftOut(name="c", reason="r")], rows, request).cut_off == 1


# Resuming


def test_a_cancelled_request_is_resumed_and_a_finished_one_starts_from_scratch(
    predictor, clips, tmp_path, asked, monkeypatch
):
    archive = zip_of(clips, tmp_path / "in.zip")
    whole, _ = packed(predictor, archive, tmp_path / "whole")
    asked.clear()
    original = Journal.add

    def cancelled(self, rows):
        original(self, rows)
        if len(asked) == 2:
            raise Stopped

    monkeypatch.setattr(Journal, "add", cancelled)
    with pytest.raises(Stopped):
        predictor(Metrics(), input_videos=archive, batch_size=2, **QUICK)
    assert [path.suffix for path in journals()] == [".jsonl"]
    assert list(predictor.scratch.folder.iterdir()) == []
    monkeypatch.setattr(Journal, "add", original)
    out, metrics = packed(predictor, archive, tmp_path / "out", trigger_word="TOK")
    assert asked == [2, 2, 1]
    assert captions(out) == {name: f"TOK {text}" for name, text in captions(whole).items()}
    assert metrics["captioned"] == 5
    assert journals() == []


def test_another_prompt_starts_from_scratch(predictor, clips, tmp_path, asked):
    local(clips, tmp_path / "out")
    local(clips, tmp_path / "out")
    assert asked == [5]
    local(clips, tmp_path / "out", prompt="What shape is it?")
    assert asked == [5, 5]
    lines = (tmp_path / "out" / "captions.jsonl").read_text().splitlines()
    assert Counter(json.loads(line)["file_name"] for line in lines) == dict.fromkeys(NAMES, 1)


def test_only_the_newest_journals_and_those_in_use_are_kept(monkeypatch):
    folder = cache_folder() / "captions"
    folder.mkdir(parents=True)
    for age in range(KEPT_JOURNALS + 5):
        (folder / f"{age}.jsonl").touch()
        os.utime(folder / f"{age}.jsonl", (1e9 - age, 1e9 - age))
    oldest = folder / f"{KEPT_JOURNALS + 4}.jsonl"
    with lock(oldest, print), resumable_journal("question", folder / "elsewhere") as record:
        record.add([Row(file_name="a", status="captioned")])
        with resumable_journal("question", folder / "elsewhere") as other:
            assert other.path == folder / "elsewhere", "another server has it"
    kept = {f"{age}.jsonl" for age in range(KEPT_JOURNALS - 1)} | {oldest.name, record.path.name}
    assert {path.name for path in folder.iterdir()} == kept


def test_a_cache_that_cannot_be_written_does_not_end_the_request(monkeypatch, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    with resumable_journal("question", tmp_path / "elsewhere.jsonl") as record:
        record.add([Row(file_name="a", status="captioned")])
    assert (tmp_path / "elsewhere.jsonl").is_file()
    assert capsys.readouterr().out.startswith("a cancelled request will start from scratch: ")


# On this machine


def test_a_folder_is_captioned_in_place_and_later_only_where_captions_are_missing(
    clips, tmp_path, asked, videos
):
    (clips / "clip 1.txt").write_text("my own words")
    (clips / "late.mp4").write_text("not yet a video")
    lines = local(clips, trigger_word="TOK")
    assert lines[-1] == "6 clips: 4 captioned, 1 kept, 1 failed, 4 cut off at max_new_tokens"
    first = captions(clips)
    assert first["clip 1.mp4"] == "my own words" and len(first) == 5
    assert errors(clips) == {"late.mp4": "video late.mp4 is a text file or playlist, not a video"}
    (clips / "late.mp4").write_bytes(videos[0])
    assert local(clips, trigger_word="OTHER")[-1].startswith("6 clips: 1 captioned, 5 kept")
    assert asked == [4, 1]
    assert captions(clips).items() >= first.items()
    assert captions(clips)["late.mp4"].startswith("OTHER ")
    assert not (clips / "errors.jsonl").exists()
    assert local(clips)[-1] == "6 clips: 0 captioned, 6 kept"
    local(clips, existing_captions="replace", trigger_word="NEW")
    assert asked == [4, 1, 1], "captions in the journal are not generated again"
    assert all(text.startswith("NEW ") for text in captions(clips).values())


def test_an_archive_is_captioned_into_a_folder_with_its_clips(clips, tmp_path):
    local(zip_of(clips, tmp_path / "in.zip"), tmp_path / "out")
    assert sorted(captions(tmp_path / "out")) == sorted(NAMES)
    assert not (tmp_path / "out" / ".unpacked").exists()
    assert not (tmp_path / "out" / ".captions.lock").exists()
    local(clips, tmp_path / "texts", include_videos=False)
    assert not list((tmp_path / "texts").rglob("*.mp4"))


def test_a_stopped_run_leaves_its_journal_and_is_resumed(clips, tmp_path, asked, monkeypatch):
    stop = threading.Event()
    original = Journal.add

    def last(self, rows):
        original(self, rows)
        stop.set()

    monkeypatch.setattr(Journal, "add", last)
    with pytest.raises(Stopped):
        local(clips, tmp_path / "out", stop=stop, batch_size=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["captions.jsonl"]
    monkeypatch.setattr(Journal, "add", original)
    assert local(clips, tmp_path / "out")[0] == "2 of 5 clips are done already"
    assert asked == [2, 3]


def test_the_journals_of_several_processes_are_merged(clips, tmp_path, asked):
    out = tmp_path / "out"
    local(clips, out)
    rows = Journal(out / "captions.jsonl").read()
    first, second, *_ = rows
    stale = replace(rows[first], fingerprint="of another question", caption="stale")
    other = Journal(out / "captions.1.jsonl")
    other.add([rows[second], stale])
    other.close()
    Journal(out / "captions.jsonl").rewrite(row for name, row in rows.items() if name != second)
    local(clips, out)
    assert asked == [5]
    assert Journal(out / "captions.jsonl").read() == rows
    assert not (out / "captions.1.jsonl").exists()


def test_two_runs_in_one_folder_are_refused(clips):
    with (
        lock(clips / ".captions", print),
        pytest.raises(UserError, match="another process is captioning"),
    ):
        local(clips)
