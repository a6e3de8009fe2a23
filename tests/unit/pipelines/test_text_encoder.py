"""The service's T5 beside transformers'."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.pipelines.text_encoder import distance_buckets, is_ours, load_text_encoder, read_tensors

EMBEDDED = Path(__file__).resolve().parents[3] / "weights" / "tiny-t2v" / "text_encoder"


@pytest.fixture
def folder(tmp_path):
    """A T5 v1.1 of three layers with random weights, in several files."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4}
    model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def load(folder, dtype=torch.float32):
    return load_text_encoder(folder, read_tensors(folder, dtype=dtype, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_are_transformers_bit_for_bit(folder, dtype):
    from transformers import T5EncoderModel

    reference = T5EncoderModel.from_pretrained(folder, dtype=dtype)
    encoder = load(folder, dtype)
    for tokens in (1, 20, 226):  # beyond the distance at which all buckets are full, too
        ids = torch.randint(0, 200, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.inference_mode():
            expected, found = reference(ids)[0], encoder(ids)
        assert found[0] is found.last_hidden_state
        assert found[0].dtype == expected.dtype
        assert torch.equal(found[0], expected)


def test_in_float16_the_layer_that_overflows_stays_in_float32(folder):
    kinds = {name: parameter.dtype for name, parameter in load(folder, torch.float16).named_parameters()}
    exact = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert exact == {f"encoder.block.{layer}.layer.1.DenseReluDense.wo.weight" for layer in range(3)}


def test_an_encoder_is_ready_for_inference(folder):
    encoder = load(folder, torch.bfloat16)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.dtype == torch.bfloat16
    assert encoder.device == torch.device("cpu")
    assert encoder.config.to_dict()["d_model"] == 128


def test_the_other_name_of_the_embeddings_is_understood(tmp_path):
    tensors = load_file(EMBEDDED / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    tensors["decoder.final_layer_norm.weight"] = torch.ones(64)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((EMBEDDED / "config.json").read_text())
    assert torch.equal(load(tmp_path).shared.weight, load(EMBEDDED).shared.weight)


def test_a_missing_tensor_is_an_error(tmp_path):
    tensors = load_file(EMBEDDED / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((EMBEDDED / "config.json").read_text())
    with pytest.raises(RuntimeError, match=r'Missing key.*"encoder.final_layer_norm.weight"'):
        load(tmp_path)


def test_another_t5_is_left_to_transformers(tmp_path):
    assert is_ours(EMBEDDED)
    assert not is_ours(tmp_path)
    config = json.loads((EMBEDDED / "config.json").read_text()) | {"feed_forward_proj": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    assert not is_ours(tmp_path)


def test_near_distances_have_buckets_of_their_own_and_far_ones_share_the_last():
    distances = torch.tensor([0, -1, -7, 1, 7, -127, -128, -500, 128, 500])
    found = distance_buckets(distances, buckets=32, far=128)
    assert found.tolist() == [0, 1, 7, 17, 23, 15, 15, 15, 31, 31]
