"""Checkpoints are read without executing anything, and other files refused by what they are."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lib.convert import reading
from lib.convert.reading import open_checkpoint
from lib.errors import UserError
from tests import convert_factory as factory

STATES = "mp_rank_00_model_states.pt"
TRUST = 'save its tensors alone with torch.save({"module": weights}, "file.pt").'


class Executes:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


class Unknown:
    """A class that only the author of the file has."""


def names(path: Path, tmp_path: Path) -> list[str]:
    with open_checkpoint(path) as checkpoint:
        return sorted(checkpoint.tensors)


def refusal(path: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught, open_checkpoint(path):
        pass
    return str(caught.value)


def save(path: Path, content: object, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"module": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"module": {"state_dict": state}}},
    ],
)
def test_nested_wrappers_are_removed(tmp_path, wrap):
    state = {"model.diffusion_model.a.weight": torch.ones(2), "b.weight": torch.ones(1)}
    assert names(save(tmp_path / "file.pt", wrap(state)), tmp_path) == ["a.weight", "b.weight"]


@pytest.mark.parametrize(
    "prefix",
    ["module.model.diffusion_model._orig_mod.", "_orig_mod.model.diffusion_model.module.", "module."],
)
def test_prefixes_of_libraries_are_removed_in_any_order(tmp_path, prefix):
    path = save(tmp_path / "file.pt", {f"{prefix}transformer.a": torch.ones(2)})
    assert names(path, tmp_path) == ["transformer.a"]


def test_parts_are_separated_and_dropped_entries_named(tmp_path):
    state = {
        "module.model.diffusion_model.a": torch.ones(2),
        "module.first_stage_model.b": torch.ones(2),
        "module.conditioner.c": torch.ones(2),
        "module.conditioner.d": torch.ones(2),
        "note": "by me",
    }
    with open_checkpoint(save(tmp_path / "file.pt", {"module": state, "step": 7})) as checkpoint:
        assert (list(checkpoint.tensors), list(checkpoint.vae)) == (["a"], ["b"])
        assert checkpoint.dropped == {
            "step": "part of the training state, not a weight",
            "note": "not a tensor",
            "conditioner.*": "2 tensors: the text encoder; the released T5 is the same",
        }


def test_a_full_deepspeed_file_with_its_random_state_is_read(tmp_path):
    assert "time_embed.0.weight" in names(factory.source("t2v-2b-finetuned"), tmp_path)


def test_values_are_mapped_from_the_file_not_read(tmp_path):
    path = save(tmp_path / "file.pt", {"a": torch.arange(4.0)})
    with open_checkpoint(path) as checkpoint:
        place = path.read_bytes().find(np.float32([0, 1, 2, 3]).tobytes())
        with path.open("r+b") as file:
            file.seek(place)
            file.write(np.float32([9]).tobytes())
        assert checkpoint.tensors["a"].tolist() == [9, 1, 2, 3]


def test_only_small_files_of_the_old_format_are_read(tmp_path, monkeypatch):
    path = save(tmp_path / "old.pt", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert names(path, tmp_path) == ["a"]
    monkeypatch.setattr(reading, "MAX_LEGACY_BYTES", 10)
    assert refusal(path, tmp_path) == (
        "old.pt is in the format of PyTorch before 1.6, which cannot be mapped, and has "
        f"{path.stat().st_size} bytes. Load it on a machine with enough memory and save it with "
        'torch.save({"module": weights}, "file.pt").'
    )


def test_an_invalid_config_is_ignored(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
    for content in ("[" * 100_000, "{", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
            assert checkpoint.config is None


def test_nothing_of_a_pickle_is_executed(tmp_path):
    place = tmp_path / "executed"
    path = save(tmp_path / "model.pt", {"module": {"a": torch.ones(2), "b": Executes(place)}})
    assert refusal(path, tmp_path) == (
        "model.pt is refused: in addition to tensors it holds posix.mkdir, and loading that could run any "
        f"code. Nothing was executed. If you trust the file, {TRUST}"
    )
    old = save(tmp_path / "old.pt", {"b": Executes(place)}, _use_new_zipfile_serialization=False)
    assert "it holds posix.mkdir" in refusal(old, tmp_path)
    assert not place.exists()
    torch.load(path, weights_only=False)
    assert place.is_dir()  # the file does execute code in a program that trusts it


def test_objects_inside_a_random_state_are_not_executed(tmp_path):
    place = tmp_path / "executed"
    state = {"module": {"a": torch.ones(2)}, "np_rng_state": np.array([Executes(place)], dtype=object)}
    assert "model.pt is refused" in refusal(save(tmp_path / "model.pt", state), tmp_path)
    assert not place.exists()


def test_an_unknown_class_is_refused_by_its_name(tmp_path):
    path = save(tmp_path / "model.pt", {"module": {"a": torch.ones(2)}, "config": Unknown()})
    assert refusal(path, tmp_path).startswith(
        "model.pt is refused: in addition to tensors it holds tests.unit.convert.test_reading.Unknown, and"
    )


def test_a_pickled_module_and_a_program_are_refused(tmp_path):
    path = save(tmp_path / "layer.pt", torch.nn.Linear(2, 2))
    assert "it holds torch.nn.modules.linear.Linear" in refusal(path, tmp_path)
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        archive.writestr("program/data.pkl", b"")
        archive.writestr("program/constants.pkl", b"")
    assert refusal(tmp_path / "program.pt", tmp_path) == (
        "program.pt is a TorchScript program, not a checkpoint; it is not run."
    )


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    whole = factory.source("t2v-2b").read_bytes()
    path = tmp_path / "model.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    message = "model.pt is damaged or cut off: its table of contents is missing."
    assert refusal(path, tmp_path) == message


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-8])
    assert refusal(tmp_path / "model.safetensors", tmp_path).startswith(
        "model.safetensors is not a complete safetensors file: incomplete metadata, file not fully covered."
    )


def test_other_files_are_named_for_what_they_are(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    for content, wrong in (
        (b"<!DOCTYPE html><html>", "a web page, not the file itself; copy the address of the download"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer, not the file that it points to",
        ),
        (b"", "empty"),
        (picture.getvalue(), "not a checkpoint: it is neither a torch.save file nor safetensors"),
        (b"hello", "not a checkpoint: it is neither a torch.save file nor safetensors"),
        (
            pickle.dumps({"a": 1}),
            f"a pickle that torch.save did not write. Save its tensors with {reading.RESAVE}",
        ),
    ):
        (tmp_path / "file.pt").write_bytes(content)
        assert refusal(tmp_path / "file.pt", tmp_path) == f"file.pt is {wrong}."


def test_content_without_named_tensors_is_refused(tmp_path):
    for content, reason in (
        ([torch.ones(2)], "it holds a list, not named tensors"),
        ({"step": 3, "loss": 0.1}, "it holds no tensors"),
        ({1: torch.ones(2)}, "it has a tensor named 1"),
    ):
        path = save(tmp_path / "file.pt", content)
        assert refusal(path, tmp_path) == f"file.pt is not a checkpoint: {reason}."
    assert refusal(save(tmp_path / "s.pt", {"a": torch.ones(2, 2).to_sparse()}), tmp_path) == (
        "s.pt cannot be converted: 'a' is not a plain tensor. Quantized files are not supported."
    )


def test_a_checkpoint_that_was_compressed_again_is_refused(tmp_path):
    with (
        zipfile.ZipFile(factory.source("t2v-2b")) as whole,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in whole.namelist():
            packed.writestr(member, whole.read(member))
    assert refusal(tmp_path / "model.pt", tmp_path).startswith(
        "model.pt was compressed after torch.save wrote it;"
    )
