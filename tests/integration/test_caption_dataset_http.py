"""Captioning archives over HTTP: results, refusals, cancelling, killing."""

import base64
import contextlib
import json
import os
import signal
import threading
import zipfile
from pathlib import Path

import httpx2
import pytest

from lib.datasets.clips import find_clips
from lib.serving.client import request
from lib.serving.server import Server
from lib.storage.archive import extract_archive
from lib.storage.scratch import PREFIX
from tests.caption_factory import write_captioner
from tests.clips_factory import data_uri, write_clips, zip_of, zip_with
from tests.integration.conftest import group_members, wait_for
from tests.serving import wait_until_idle

COUNT = 6
SLOW = {"max_new_tokens": 150, "batch_size": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captioning")
    write_captioner(folder / "nonsense", ends=False)
    for text in write_clips(folder / "clips" / "stars", COUNT).glob("*.txt"):
        text.unlink()
    zip_of(folder / "clips", folder / "clips.zip")
    return folder


@pytest.fixture(scope="module")
def environment(folder) -> dict[str, str]:
    return {"COGVIDEOX_MODEL": str(folder / "nonsense"), "COGVIDEOX_CACHE": str(folder / "cache")}


@pytest.fixture(scope="module")
def server(serve, environment) -> Server:
    return serve("caption_dataset", environment=environment)


def put(server: Server, identifier: str, **inputs) -> dict:
    wait_until_idle(server.url)
    _, body = request(server.url, "PUT", f"/predictions/{identifier}", {"input": inputs})
    return json.loads(body)


def unpacked(reply: dict, target: Path) -> Path:
    assert reply["status"] == "succeeded", reply
    archive = target.with_suffix(".reply.zip")
    archive.write_bytes(base64.b64decode(reply["output"].split(",", 1)[1]))
    return extract_archive(archive, target)


def captions(folder: Path) -> dict[str, str]:
    clips, left_out = find_clips(folder)
    assert left_out == []
    return {clip.name: clip.caption for clip in clips}


def in_background(server: Server, identifier: str, **inputs) -> threading.Thread:
    """Start a request and wait until it has captioned a clip."""
    thread = threading.Thread(target=_put_in_vain, args=(server, identifier, inputs))
    thread.start()
    kept = Path(server.environment["COGVIDEOX_CACHE"]) / "captions"
    wait_for(lambda: any(path.stat().st_size for path in kept.glob("*.jsonl")), seconds=120)
    return thread


def _put_in_vain(server: Server, identifier: str, inputs: dict) -> None:
    with contextlib.suppress(httpx2.HTTPError):  # the server was killed
        request(server.url, "PUT", f"/predictions/{identifier}", {"input": inputs})


def done_already(reply: dict) -> int:
    [line] = [line for line in reply["logs"].splitlines() if line.endswith("clips are done already")]
    return int(line.split()[0])


@pytest.fixture(scope="module")
def reference(server, folder) -> dict[str, str]:
    """Run the slow request without interruption."""
    reply = put(server, "reference", input_videos=data_uri(folder / "clips.zip"), **SLOW)
    assert f"progress: captioning {COUNT}/{COUNT}, 0:00 left" in reply["logs"]
    assert {key: reply["metrics"][key] for key in ("clips", "captioned", "kept", "failed", "model")} == {
        "clips": COUNT, "captioned": COUNT, "kept": 0, "failed": 0, "model": "nonsense"
    }  # fmt: skip
    return captions(unpacked(reply, folder / "reference"))


def test_an_archive_is_returned_with_captions(reference):
    assert sorted(reference) == [f"stars/star-{index:03d}.mp4" for index in range(COUNT)]
    assert len(set(reference.values())) == COUNT


def test_a_cancelled_request_is_resumed_when_sent_again(server, folder, reference, tmp_path):
    inputs = {"input_videos": data_uri(folder / "clips.zip"), **SLOW}
    thread = in_background(server, "cancelled", **inputs)
    request(server.url, "POST", "/predictions/cancelled/cancel")
    thread.join(30)
    wait_until_idle(server.url)
    tmp = server.backend.scratch / "tmp"
    wait_for(lambda: not [path for path in tmp.rglob("*") if not path.name.startswith(PREFIX)])
    reply = put(server, "again", **inputs)
    assert 1 <= done_already(reply) < COUNT
    assert captions(unpacked(reply, tmp_path / "again")) == reference
    assert list((folder / "cache" / "captions").iterdir()) == []


def test_bad_archives_are_refused_and_the_next_request_works(server, folder, tmp_path):
    encrypted = bytearray(zip_with(tmp_path / "plain.zip", {"a.mp4": b"x"}).read_bytes())
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "encrypted.zip").write_bytes(encrypted)
    refusals = {
        zip_with(tmp_path / "bomb.zip", {"a.mp4": 1100 << 20}): "unpacks to more than the 1.1 GB",
        zip_with(tmp_path / "up.zip", {"../a.mp4": b"x"}): "'../a.mp4' would leave the target folder",
        tmp_path / "encrypted.zip": "'a.mp4' is encrypted. Pack the files without a password.",
        zip_with(tmp_path / "empty.zip", {}): "holds no clips: it is empty",
        zip_with(tmp_path / "posing.zip", {"a.mp4": b"I am text"}): "a.mp4 is a text file or playlist",
        folder / "nonsense" / "config.json": "is neither a folder nor a zip or tar archive",
    }
    for place, (archive, message) in enumerate(refusals.items()):
        reply = put(server, f"refused-{place}", input_videos=data_uri(archive))
        assert (reply["status"], message in reply["error"]) == ("failed", True), (archive.name, reply)
    with zipfile.ZipFile(folder / "clips.zip") as clips:
        members = {
            "deep/ü.mp4": clips.read("stars/star-000.mp4"),
            "bad.mp4": b"text",
            "other.txt": b"no clip's",
        }
    archive = zip_with(tmp_path / "good.zip", members)
    reply = put(server, "good", input_videos=data_uri(archive), max_new_tokens=4, trigger_word="TOK")
    out = unpacked(reply, tmp_path / "good")
    [(name, text)] = captions(out).items()
    assert name == "deep/ü.mp4" and text.startswith("TOK ")
    assert json.loads((out / "errors.jsonl").read_text())["file_name"] == "bad.mp4"
    assert "left out: bad.mp4: video bad.mp4 is a text file or playlist, not a video\n" in reply["logs"]
    assert list((folder / "cache" / "captions").iterdir()) == []


@pytest.mark.slow
def test_after_a_killed_server_no_clip_is_captioned_twice(server, folder, environment, reference, tmp_path):
    inputs = {"input_videos": data_uri(folder / "clips.zip"), **SLOW}
    with Server("caption_dataset", local_sources=True, environment=environment, timeout=300) as doomed:
        thread = in_background(doomed, "doomed", **inputs)
        os.killpg(doomed.backend.process.pid, signal.SIGKILL)  # including the worker process
        thread.join(30)
        # Until then it holds the journal's lock.
        wait_for(lambda: not group_members(doomed.backend.process.pid))
    [record] = (folder / "cache" / "captions").glob("*.jsonl")
    done = [json.loads(line)["file_name"] for line in record.read_text().splitlines()]
    reply = put(server, "after", **inputs)
    assert done_already(reply) == len(done) == len(set(done))
    assert f"progress: captioning {COUNT - len(done)}/{COUNT - len(done)}" in reply["logs"]
    assert captions(unpacked(reply, tmp_path / "after")) == reference
