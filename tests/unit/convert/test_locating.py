"""The weights in folders and shards are found, and ambiguous or incomplete ones refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.convert.test_reading import STATES, names, refusal, save


def test_safetensors_are_read_from_one_file_or_shards(tmp_path):
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
        "model is incomplete: m-00002-of-00002.safetensors of m.safetensors.index.json is missing."
    )


def test_an_invalid_index_or_one_that_leaves_its_folder_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = folder / "m.safetensors.index.json"
    invalid = "model: m.safetensors.index.json is not an index of safetensors files."
    for content in ('{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000, "{}"):
        index.write_text(content)
        assert refusal(folder, tmp_path) == invalid
    for file in ("../outside.safetensors", 70 * "long", ".."):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        assert refusal(folder, tmp_path) == (
            f"model is incomplete: {file} of m.safetensors.index.json is missing."
        )


@pytest.fixture
def download(tmp_path) -> Path:
    """A SAT download: transformer/latest and transformer/1000/mp_rank_00_model_states.pt."""
    save(tmp_path / "sat" / "transformer" / "1000" / STATES, {"module": {"a": torch.ones(2)}})
    (tmp_path / "sat" / "transformer" / "latest").write_text("1000\n")
    return tmp_path / "sat"


def test_the_folder_of_a_download_is_read_at_its_last_step(download, tmp_path):
    assert names(download, tmp_path) == names(download / "transformer", tmp_path) == ["a"]


def test_latest_that_names_nothing_or_leaves_the_folder_is_refused(download, tmp_path):
    save(download / STATES, {"module": {"outside": torch.ones(2)}})
    for step in ("2000", "../other", "..", ".", "", 70 * "long"):
        (download / "transformer" / "latest").write_text(step)
        assert refusal(download, tmp_path) == (
            f"sat: its file latest names {step[:80]!r}, but there is no such folder next to it."
        )


def test_shards_of_zero_3_are_refused_by_name_and_by_content(tmp_path):
    folder = tmp_path / "run"
    save(folder / "1000" / "zero_pp_rank_0_mp_rank_00_model_states.pt", {"module": {"a": torch.empty(0)}})
    (folder / "latest").write_text("1000")
    assert refusal(folder, tmp_path) == (
        "run holds shards of ZeRO stage 3 (zero_pp_rank_0_mp_rank_00_model_states.pt): the weights are "
        "split between processes. Join them first with the zero_to_fp32.py that DeepSpeed saves next to them."
    )
    renamed = save(tmp_path / "model.pt", {"module": {"a": torch.empty(0)}})
    assert refusal(renamed, tmp_path) == (
        "model.pt holds no weights: 'a' is empty, as in files of ZeRO stage 3, which splits the weights "
        "between processes. Join them first with the zero_to_fp32.py that DeepSpeed saves next to them."
    )


def test_complete_weights_next_to_optimizer_states_are_read(download, tmp_path):
    """Stages 1 and 2 shard only the optimizer."""
    step = download / "transformer" / "1000"
    for rank in range(2):
        save(step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"a": torch.ones(2)})
        save(step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"a": torch.ones(2)})
    assert names(download, tmp_path) == names(step, tmp_path) == ["a"]
    (step / STATES).unlink()
    assert refusal(step, tmp_path).startswith("1000 holds shards of ZeRO stage 3 (zero_pp_rank_0_mp_rank_00")


def test_one_part_of_a_model_parallel_checkpoint_is_refused(download, tmp_path):
    step = download / "transformer" / "1000"
    save(step / "mp_rank_01_model_states.pt", {"module": {"a": torch.ones(2)}})
    reason = (
        "one part of a model-parallel checkpoint (mp_rank_01_model_states.pt): every part holds only some "
        "rows. Merge"
    )
    for path, name in ((download, "sat"), (step / STATES, STATES)):
        assert refusal(path, tmp_path).startswith(f"{name} is {reason}")
    alone = save(tmp_path / "model.pt", {"module": {"a": torch.ones(2)}, "mp_world_size": 2})
    assert refusal(alone, tmp_path).startswith("model.pt is one of 2 parts of a model-parallel checkpoint")


def test_a_folder_without_weights_or_with_several_says_so(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert refusal(tmp_path / "nothing", tmp_path) == f"There is no file or folder {tmp_path / 'nothing'}."
    assert refusal(folder, tmp_path) == (
        f"model holds no weights: neither latest next to a folder with {STATES}, nor a .pt or .safetensors "
        "file."
    )
    (folder / "vae").mkdir()
    assert refusal(folder, tmp_path) == (
        "model holds a VAE, in its folder vae, but no transformer; give it as vae alone."
    )
    save(folder / "a.pt", {"a": torch.ones(2)})
    assert names(folder, tmp_path) == ["a"]
    save(folder / "b.pt", {"a": torch.ones(2)})
    assert refusal(folder, tmp_path) == ("model holds 2 files of weights (a.pt, b.pt); give one of them.")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_latest_may_start_with_a_byte_order_mark(tmp_path, encoding):
    save(tmp_path / "model" / "1000" / STATES, {"module": {"a": torch.ones(2)}})
    (tmp_path / "model" / "latest").write_bytes("1000\r\n".encode(encoding))
    assert names(tmp_path / "model", tmp_path) == ["a"]
