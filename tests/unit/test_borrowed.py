"""A converted folder runs with the text encoder of a model that was downloaded before."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lib import weights
from lib.derived import derive_spec
from lib.errors import UserError
from lib.layout import missing_files
from lib.manifest import Source

TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny-t2v"


@pytest.fixture
def manifest(tmp_path) -> Path:
    (tmp_path / "manifest.toml").write_text('[released]\nrepository = "us/released"\n')
    return tmp_path / "manifest.toml"


@pytest.fixture
def cache(tmp_path) -> Path:
    """With the embedded model as if it had been downloaded."""
    place = tmp_path / "cache" / Source(name="released", repository="us/released").key
    shutil.copytree(TINY, place)
    return tmp_path / "cache"


@pytest.fixture
def converted(tmp_path) -> Path:
    """A model as conversion leaves it."""
    folder = tmp_path / "mine"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    (folder / "README.md").write_text("# mine")
    return folder


def locate(folder: Path, manifest: Path, cache: Path) -> Path:
    return weights.locate(str(folder), manifest=manifest, cache=cache, report=lambda line: None)


def test_what_is_missing_is_linked_and_nothing_copied(converted, manifest, cache):
    found = locate(converted, manifest, cache)
    assert missing_files(found) == [] and found.is_relative_to(cache)
    assert all(path.is_symlink() for path in found.iterdir())
    assert (found / "transformer").resolve() == (converted / "transformer").resolve()
    assert (found / "text_encoder").resolve().is_relative_to(cache.resolve())
    assert derive_spec(found).name == "mine"
    assert sorted(path.name for path in converted.iterdir()) == [
        "README.md", "model_index.json", "scheduler", "transformer", "vae"
    ]  # fmt: skip


def test_the_same_folder_is_found_again(converted, manifest, cache):
    first = locate(converted, manifest, cache)
    marked = first.stat().st_mtime_ns
    assert locate(converted, manifest, cache) == first and first.stat().st_mtime_ns == marked
    assert [path.name for path in (cache / "completed").iterdir()] == [first.parent.name]


def test_without_a_downloaded_model_the_folder_is_refused_with_what_to_do(converted, manifest, tmp_path):
    with pytest.raises(UserError) as caught:
        locate(converted, manifest, tmp_path / "empty")
    assert str(caught.value) == (
        f"{converted} has no text_encoder and no tokenizer, and no downloaded model has what fits its "
        "transformer (a text encoder of width 64). Start once with a released model, for example "
        "COGVIDEOX_MODEL=cogvideox-2b, which downloads one, or convert it with the text encoder included."
    )
    assert not (tmp_path / "empty").exists()


def test_a_text_encoder_of_another_width_is_not_borrowed(converted, manifest, cache):
    config = converted / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"text_embed_dim": 24}))
    with pytest.raises(UserError, match=r"\(a text encoder of width 24\)"):
        locate(converted, manifest, cache)


def test_a_half_downloaded_model_lends_nothing(converted, manifest, cache):
    for file in cache.rglob("text_encoder/*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="no downloaded model has what fits"):
        locate(converted, manifest, cache)


def test_a_folder_that_lacks_more_is_not_whole_as_before(converted, manifest, cache):
    shutil.rmtree(converted / "vae")
    with pytest.raises(UserError, match=r"is not a whole model; it lacks text_encoder/config\.json"):
        locate(converted, manifest, cache)


def test_a_component_that_is_there_but_broken_is_not_replaced(converted, manifest, cache):
    os.mkdir(converted / "text_encoder")
    with pytest.raises(UserError, match=r"is not a whole model; it lacks text_encoder/config\.json"):
        locate(converted, manifest, cache)
