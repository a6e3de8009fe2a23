"""A converted model is completed with the text encoder and the VAE of downloaded ones."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from lib.errors import UserError
from lib.models.derive import derive_spec
from lib.models.layout import missing_files
from lib.weights import checkpoints
from lib.weights.manifest import Source

TINY = Path(__file__).resolve().parents[3] / "weights" / "tiny-t2v"


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
    return checkpoints.locate(str(folder), manifest=manifest, cache=cache, report=lambda line: None)


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
        f"{converted} has no text_encoder and no tokenizer, and no downloaded model has what its "
        "transformer needs (a text encoder of width 64). Start once with a released model, for example "
        "COGVIDEOX_MODEL=cogvideox-2b, which downloads it, or convert the model with the text encoder "
        "included."
    )
    assert not (tmp_path / "empty").exists()


def test_a_text_encoder_of_another_width_is_not_shared(converted, manifest, cache):
    change(converted, "transformer", text_embed_dim=24)
    with pytest.raises(UserError, match=r"\(a text encoder of width 24\)"):
        locate(converted, manifest, cache)


def test_an_incomplete_model_is_not_a_donor(converted, manifest, cache):
    for file in cache.rglob("text_encoder/*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="no downloaded model has what its transformer needs"):
        locate(converted, manifest, cache)


@pytest.fixture
def without_vae(converted) -> Path:
    """A model of which the transformer alone was converted."""
    shutil.rmtree(converted / "vae")
    return converted


def change(folder: Path, part: str, **values) -> None:
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def test_a_vae_is_shared_from_a_model_of_the_transformers_kind(without_vae, manifest, cache):
    found = locate(without_vae, manifest, cache)
    assert missing_files(found) == []
    assert (found / "vae").resolve().is_relative_to(cache.resolve())
    assert (found / "transformer").resolve() == (without_vae / "transformer").resolve()
    pipeline = CogVideoXPipeline.from_pretrained(found, local_files_only=True)
    lent = load_file(next(cache.rglob("vae/*.safetensors")))
    assert all(torch.equal(tensor, lent[name]) for name, tensor in pipeline.vae.state_dict().items())
    assert not (without_vae / "vae").exists()


def test_text_encoder_and_vae_may_come_from_different_models(without_vae, manifest, cache):
    with manifest.open("a") as file:
        file.write('[other]\nrepository = "us/other"\n')
    other = cache / Source(name="other", repository="us/other").key
    shutil.copytree(TINY, other)
    released = cache / Source(name="released", repository="us/released").key
    change(released, "transformer", use_rotary_positional_embeddings=False)
    change(other, "text_encoder", d_model=24)
    found = locate(without_vae, manifest, cache)
    assert (found / "text_encoder").resolve() == (released / "text_encoder").resolve()
    assert (found / "vae").resolve() == (other / "vae").resolve()


@pytest.mark.parametrize(
    ("lent", "wanted", "family"),
    [
        ({"use_rotary_positional_embeddings": False}, {}, "cogvideox-5b"),
        ({}, {"use_rotary_positional_embeddings": False}, "cogvideox-2b"),
        ({}, {"patch_size_t": 2}, "cogvideox1.5-5b"),
        ({}, {"out_channels": 16}, "cogvideox-5b"),
    ],
)
def test_a_vae_of_another_kind_is_not_shared(without_vae, manifest, cache, lent, wanted, family):
    change(cache / Source(name="released", repository="us/released").key, "transformer", **lent)
    change(without_vae, "transformer", **wanted)
    with pytest.raises(UserError) as caught:
        locate(without_vae, manifest, cache)
    assert str(caught.value) == (
        f"{without_vae} has no vae, and no downloaded model has what its transformer needs "
        f"(the VAE of {family}). Start once with a released model, for example "
        f"COGVIDEOX_MODEL={family}, which downloads it, or convert the model with its VAE included."
    )


def test_without_a_downloaded_model_all_that_is_missing_is_named(without_vae, manifest, tmp_path):
    with pytest.raises(UserError) as caught:
        locate(without_vae, manifest, tmp_path / "empty")
    assert str(caught.value) == (
        f"{without_vae} has no text_encoder and no tokenizer and no vae, and no downloaded model has what "
        "its transformer needs (a text encoder of width 64, the VAE of cogvideox-5b). Start once with a "
        "released model, for example COGVIDEOX_MODEL=cogvideox-5b, which downloads it, or convert the model "
        "with the text encoder and its VAE included."
    )


def test_image_to_video_of_1_5_has_a_vae_of_its_own(without_vae, manifest, cache):
    change(without_vae, "transformer", patch_size_t=2)
    change(cache / Source(name="released", repository="us/released").key, "transformer", patch_size_t=2)
    index = without_vae / "model_index.json"
    index.write_text(index.read_text().replace("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"))
    with pytest.raises(UserError, match=r"the VAE of cogvideox1\.5-5b-i2v"):
        locate(without_vae, manifest, cache)


def test_a_folder_without_another_component_is_incomplete(converted, manifest, cache):
    shutil.rmtree(converted / "scheduler")
    with pytest.raises(
        UserError, match=r"is not a complete model; missing: scheduler/scheduler_config\.json"
    ):
        locate(converted, manifest, cache)


def test_a_component_that_is_there_but_broken_is_not_replaced(converted, manifest, cache):
    os.mkdir(converted / "text_encoder")
    with pytest.raises(UserError, match=r"is not a complete model; missing: text_encoder/config\.json"):
        locate(converted, manifest, cache)
