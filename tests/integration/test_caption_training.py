"""A captioned data set can be used for training as it is."""

import json
import os
import zipfile

import pytest

from lib.datasets.clips import find_clips
from lib.serving.client import request
from lib.serving.outputs import save_output
from lib.serving.registry import PROJECT
from tests.caption_factory import write_captioner
from tests.clips_factory import data_uri, write_clips, zip_of
from tests.serving import wait_until_idle
from tests.training_commands import finished, losses

pytestmark = pytest.mark.slow

TRAIN = (str(PROJECT / "script" / "train"),)


def test_the_predictors_zip_can_be_used_for_training(serve, tmp_path):
    clips = write_clips(tmp_path / "clips", 3)
    (clips / "star-001.txt").unlink()
    (clips / "star-002.txt").unlink()
    (clips / "bad.mp4").write_text("I am no video")
    cache = {"COGVIDEOX_CACHE": str(tmp_path / "cache")}
    model = write_captioner(tmp_path / "nonsense", ends=False)
    server = serve("caption_dataset", environment=cache | {"COGVIDEOX_MODEL": str(model)})
    wait_until_idle(server.url)
    inputs = {
        "input_videos": data_uri(zip_of(clips, tmp_path / "clips.zip")),
        "max_new_tokens": 8,
        "trigger_word": "TOK",
    }
    _, body = request(server.url, "POST", "/predictions", {"input": inputs})
    reply = json.loads(body)
    assert reply["status"] == "succeeded", reply
    [archive] = save_output(reply["output"], target=tmp_path / "captioned.zip")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "out")
        rows = [json.loads(line) for line in packed.read("metadata.jsonl").splitlines()]
    found, left_out = find_clips(tmp_path / "out")
    assert left_out == []
    status, _, err = finished(
        tmp_path, os.environ | cache, f"input_videos={archive}", "output_dir=lora", "rank=4",
        "max_train_steps=2", launch=TRAIN,
    )  # fmt: skip
    assert status == 0, err
    assert "left out" not in err
    assert len(losses(tmp_path / "lora")) == 2
    trained = (tmp_path / "lora" / "result" / "captions.jsonl").read_text().splitlines()
    captions = {row["clip"]: row["caption"] for row in map(json.loads, trained)}
    assert captions == {row["file_name"]: row["text"] for row in rows}
    assert captions == {clip.name: clip.caption for clip in found}
    assert captions["star-000.mp4"] == "a magenta star circles on black"
    assert captions["star-001.mp4"].startswith("TOK ") and captions["star-002.mp4"].startswith("TOK ")
