"""The registry of predictors: the cog*.yaml files, and what a local server takes from them."""

import pytest

from lib.errors import UserError
from lib.serving.registry import (
    PROJECT,
    absolute_folders,
    find_predictor,
    local_environment,
    predictors,
    read_config,
)


def test_every_file_names_a_predictor_that_exists():
    found = predictors()
    assert found["i2v"].file.name == "cog.yaml"
    assert found["t2v"].file.name == "cog.t2v.yaml"
    assert len(found) == len(list(PROJECT.glob("cog*.yaml")))
    for config in found.values():
        assert config.predictor.is_file()
        assert config.train is None or config.train.is_file()


def test_a_summary_says_in_a_few_words_what_a_predictor_does_and_nothing_about_its_code():
    summaries = {name: config.summary() for name, config in predictors().items()}
    assert summaries["caption"] == "Describe a video" and summaries["t2v"] == "Text to video"
    assert not [text for text in summaries.values() if "Cog " in text or len(text) > 60]


def test_images_get_a_released_model_but_local_servers_do_not(monkeypatch, tmp_path):
    monkeypatch.delenv("COGVIDEOX_STEPS", raising=False)
    assert predictors()["t2v"].environment["COGVIDEOX_MODEL"] == "cogvideox-5b"
    assert predictors()["i2v"].environment["COGVIDEOX_MODEL"] == "cogvideox-5b-i2v"
    file = tmp_path / "cog.sample.yaml"
    file.write_text(
        "run: predict_sample.py:Runner\nenvironment: [COGVIDEOX_MODEL=big, COGVIDEOX_STEPS=a=b]\n"
    )
    assert local_environment(read_config(file)) == {"COGVIDEOX_STEPS": "a=b"}
    monkeypatch.setenv("COGVIDEOX_STEPS", "mine")
    assert local_environment(read_config(file)) == {}


def test_relative_folders_become_absolute_for_the_server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "home" / "models").mkdir(parents=True)
    assert absolute_folders({"COGVIDEOX_MODEL": "mine", "COGVIDEOX_CACHE": "not/yet", "OTHER": "mine"}) == {
        "COGVIDEOX_MODEL": str(tmp_path / "mine"),
        "COGVIDEOX_CACHE": str(tmp_path / "not/yet"),
    }
    assert absolute_folders({"COGVIDEOX_MODEL": "~/models", "COGVIDEOX_CACHE": "~/cache"}) == {
        "COGVIDEOX_MODEL": str(tmp_path / "home/models"),
        "COGVIDEOX_CACHE": str(tmp_path / "home/cache"),
    }
    assert absolute_folders({"COGVIDEOX_MODEL": "", "COGVIDEOX_CACHE": ""}) == {}
    assert absolute_folders({"COGVIDEOX_MODEL": "owner/name"}) == {}


@pytest.mark.parametrize("name", ["tiny-t2v", "cogvideox-5b", "cogvlm2-caption"])
def test_a_folder_with_the_name_of_a_known_model_does_not_hide_it(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert absolute_folders({"COGVIDEOX_MODEL": name}) == {}
    assert absolute_folders({"COGVIDEOX_MODEL": f"./{name}"}) == {"COGVIDEOX_MODEL": str(tmp_path / name)}


def test_a_new_file_appears_by_itself_and_an_unknown_name_lists_all(tmp_path):
    (tmp_path / "cog.caption.yaml").write_text("run: predict_caption.py:Runner\n")
    (tmp_path / "cog.yaml").write_text("run: predict_i2v.py:Runner\ntrain: training/train.py:train\n")
    assert list(predictors(tmp_path)) == ["caption", "i2v"]
    assert find_predictor("i2v", tmp_path).train == tmp_path / "training" / "train.py"
    with pytest.raises(UserError, match="no predictor 't2v'; there are: caption, i2v"):
        find_predictor("t2v", tmp_path)
