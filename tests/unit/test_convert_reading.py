"""What is handed over is read without running it, or refused by a message that says what it is."""

import io
import json
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
TRUST = 'write its tensors alone with torch.save({"module": weights}, "file.pt").'


class Executes:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


class Unknown:
    """A class that only the author of the file has."""


def names(path: Path, tmp_path: Path) -> list[str]:
    with open_checkpoint(path, work=tmp_path / "work") as checkpoint:
        return sorted(checkpoint.tensors)


def refusal(path: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught, open_checkpoint(path, work=tmp_path / "work"):
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
def test_wrappers_in_any_nesting_are_taken_off(tmp_path, wrap):
    state = {"model.diffusion_model.a.weight": torch.ones(2), "b.weight": torch.ones(1)}
    assert names(save(tmp_path / "file.pt", wrap(state)), tmp_path) == ["a.weight", "b.weight"]


def test_parts_are_told_apart_and_what_is_left_out_is_named(tmp_path):
    state = {
        "module.model.diffusion_model.a": torch.ones(2),
        "module.first_stage_model.b": torch.ones(2),
        "module.conditioner.c": torch.ones(2),
        "module.conditioner.d": torch.ones(2),
        "note": "by me",
    }
    with open_checkpoint(
        save(tmp_path / "file.pt", {"module": state, "step": 7}), work=tmp_path
    ) as checkpoint:
        assert (list(checkpoint.tensors), list(checkpoint.vae)) == (["a"], ["b"])
        assert checkpoint.dropped == {
            "step": "of the training, not a weight",
            "note": "it is no tensor",
            "conditioner.*": "2 tensors: the text encoder; the released T5 is the same",
        }


def test_a_full_deepspeed_file_with_its_random_state_is_read(tmp_path):
    assert "time_embed.0.weight" in names(factory.source("t2v-2b-finetuned"), tmp_path)


def test_numpy_is_allowed_only_while_a_file_is_read(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    names(factory.source("t2v-2b-finetuned"), tmp_path)
    assert set(torch.serialization.get_safe_globals()) == before
    assert np.ndarray not in before


def test_values_are_mapped_from_the_file_not_read(tmp_path):
    path = save(tmp_path / "file.pt", {"a": torch.arange(4.0)})
    with open_checkpoint(path, work=tmp_path) as checkpoint:
        place = path.read_bytes().find(np.float32([0, 1, 2, 3]).tobytes())
        with path.open("r+b") as file:
            file.seek(place)
            file.write(np.float32([9]).tobytes())
        assert checkpoint.tensors["a"].tolist() == [9, 1, 2, 3]


def test_a_file_of_the_old_format_is_read_while_it_is_small(tmp_path, monkeypatch):
    path = save(tmp_path / "old.pt", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    assert names(path, tmp_path) == ["a"]
    monkeypatch.setattr(reading, "MAX_LEGACY_BYTES", 10)
    assert refusal(path, tmp_path) == (
        "old.pt is in PyTorch's format of before 1.6, which has to be read into memory whole, and has "
        f"{path.stat().st_size} bytes. Load it where there is memory and write it again with "
        'torch.save({"module": weights}, "file.pt").'
    )


def test_safetensors_are_read_whole_or_in_shards(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"model.diffusion_model.a": torch.ones(2)}, folder / "m-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, folder / "m-00002-of-00002.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {
        "a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"
    }}))  # fmt: skip
    assert names(folder, tmp_path) == names(index, tmp_path) == ["a", "b"]
    assert names(folder / "m-00001-of-00002.safetensors", tmp_path) == ["a"]
    (folder / "m-00002-of-00002.safetensors").unlink()
    assert refusal(folder, tmp_path) == (
        "model is not whole: m-00002-of-00002.safetensors of m.safetensors.index.json is missing."
    )


@pytest.fixture
def download(tmp_path) -> Path:
    """As SAT's weights come: transformer/latest and transformer/1000/mp_rank_00_model_states.pt."""
    save(tmp_path / "sat" / "transformer" / "1000" / STATES, {"module": {"a": torch.ones(2)}})
    (tmp_path / "sat" / "transformer" / "latest").write_text("1000\n")
    return tmp_path / "sat"


def test_the_folder_of_a_download_is_read_at_its_last_step(download, tmp_path):
    assert names(download, tmp_path) == names(download / "transformer", tmp_path) == ["a"]


def test_a_zip_of_a_download_is_unpacked_into_the_work_folder(download, tmp_path):
    with zipfile.ZipFile(tmp_path / "sat.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(download.rglob("*")):
            archive.write(path, path.relative_to(download))
    assert names(tmp_path / "sat.zip", tmp_path) == ["a"]
    assert (tmp_path / "work" / "unpacked" / "transformer" / "latest").is_file()


def test_latest_that_names_nothing_or_leaves_the_folder_is_refused(download, tmp_path):
    for step in ("2000", "../other", ""):
        (download / "transformer" / "latest").write_text(step)
        assert refusal(download, tmp_path) == (
            f"sat: its file latest names {step!r}, and there is no such folder beside it."
        )


def test_nothing_of_a_pickle_is_executed(tmp_path):
    place = tmp_path / "executed"
    path = save(tmp_path / "model.pt", {"module": {"a": torch.ones(2), "b": Executes(place)}})
    assert refusal(path, tmp_path) == (
        "model.pt is refused: beside tensors it holds posix.mkdir, and loading that could run any code. "
        f"Nothing of it was executed. If you trust the file, {TRUST}"
    )
    old = save(tmp_path / "old.pt", {"b": Executes(place)}, _use_new_zipfile_serialization=False)
    assert "it holds posix.mkdir" in refusal(old, tmp_path)
    assert not place.exists()
    torch.load(path, weights_only=False)
    assert place.is_dir()  # the file was loaded as a trusting program would, and it does what it says


def test_the_random_states_exception_opens_no_door(tmp_path):
    place = tmp_path / "executed"
    state = {"module": {"a": torch.ones(2)}, "np_rng_state": np.array([Executes(place)], dtype=object)}
    assert "model.pt is refused" in refusal(save(tmp_path / "model.pt", state), tmp_path)
    assert not place.exists()


def test_an_unknown_class_is_refused_by_its_name(tmp_path):
    path = save(tmp_path / "model.pt", {"module": {"a": torch.ones(2)}, "config": Unknown()})
    assert refusal(path, tmp_path).startswith(
        "model.pt is refused: beside tensors it holds tests.unit.test_convert_reading.Unknown, and loading"
    )


def test_a_whole_module_and_a_program_are_refused(tmp_path):
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
        "model.safetensors is no whole safetensors file: it has "
    )


def test_shards_of_zero_3_are_refused_by_name_and_by_content(tmp_path):
    folder = tmp_path / "run"
    save(folder / "1000" / "zero_pp_rank_0_mp_rank_00_model_states.pt", {"module": {"a": torch.empty(0)}})
    (folder / "latest").write_text("1000")
    assert refusal(folder, tmp_path) == (
        "run holds shards of ZeRO stage 3 (zero_pp_rank_0_mp_rank_00_model_states.pt): the weights are cut "
        "up "
        "between processes. Join them first with the zero_to_fp32.py that DeepSpeed puts beside them."
    )
    renamed = save(tmp_path / "model.pt", {"module": {"a": torch.empty(0)}})
    assert refusal(renamed, tmp_path) == (
        "model.pt holds no weights: 'a' is empty, as in the files of ZeRO stage 3, which cuts the weights up "
        "between processes. Join them first with the zero_to_fp32.py that DeepSpeed puts beside them."
    )


def test_one_part_of_a_model_parallel_checkpoint_is_refused(download, tmp_path):
    step = download / "transformer" / "1000"
    save(step / "mp_rank_01_model_states.pt", {"module": {"a": torch.ones(2)}})
    told = "one part of a model-parallel checkpoint (mp_rank_01_model_states.pt): every part holds only "
    "some rows."
    for path, name in ((download, "sat"), (step / STATES, STATES)):
        assert refusal(path, tmp_path).startswith(f"{name} is {told}")
    alone = save(tmp_path / "model.pt", {"module": {"a": torch.ones(2)}, "mp_world_size": 2})
    assert refusal(alone, tmp_path).startswith("model.pt is one of 2 parts of a model-parallel checkpoint")


def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    for content, wrong in (
        (b"<!DOCTYPE html><html>", "a web page and not the file itself; copy the address of the download"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer and not the file that it stands for",
        ),
        (b"", "empty"),
        (picture.getvalue(), "no checkpoint: neither a file of torch.save nor safetensors"),
        (b"hello", "no checkpoint: neither a file of torch.save nor safetensors"),
        (
            pickle.dumps({"a": 1}),
            f"a pickle, but none that torch.save wrote. Write its tensors with {reading.RESAVE}",
        ),
    ):
        (tmp_path / "file.pt").write_bytes(content)
        assert refusal(tmp_path / "file.pt", tmp_path) == f"file.pt is {wrong}."


def test_what_holds_no_named_tensors_is_refused(tmp_path):
    for content, reason in (
        ([torch.ones(2)], "it holds a list, not named tensors"),
        ({"step": 3, "loss": 0.1}, "it holds no tensors"),
        ({1: torch.ones(2)}, "it has a tensor named 1"),
    ):
        path = save(tmp_path / "file.pt", content)
        assert refusal(path, tmp_path) == f"file.pt is no checkpoint: {reason}."
    assert refusal(save(tmp_path / "s.pt", {"a": torch.ones(2, 2).to_sparse()}), tmp_path) == (
        "s.pt cannot be converted: 'a' is no plain tensor; quantized files are not."
    )


def test_a_checkpoint_that_was_compressed_again_is_refused(tmp_path):
    with (
        zipfile.ZipFile(factory.source("t2v-2b")) as whole,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in whole.namelist():
            packed.writestr(member, whole.read(member))
    assert refusal(tmp_path / "model.pt", tmp_path).startswith(
        "model.pt was packed a second time, compressed;"
    )


def test_a_folder_without_weights_or_with_several_says_so(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert refusal(tmp_path / "nothing", tmp_path) == f"There is no file or folder {tmp_path / 'nothing'}."
    assert refusal(folder, tmp_path) == (
        f"model holds no weights: neither latest beside a folder with {STATES}, nor a .pt or .safetensors "
        "file."
    )
    save(folder / "a.pt", {"a": torch.ones(2)})
    assert names(folder, tmp_path) == ["a"]
    save(folder / "b.pt", {"a": torch.ones(2)})
    assert refusal(folder, tmp_path) == (
        "model holds 2 files of weights (a.pt, b.pt); give the one that is meant."
    )
