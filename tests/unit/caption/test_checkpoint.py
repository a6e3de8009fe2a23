"""Checkpoints in the released layout: all keys and no others, shards, damage, the full size."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.caption.captioner import load_captioner
from lib.caption.checkpoint import entries, load_model
from lib.caption.config import CaptionConfig, VisionConfig, read_config
from lib.caption.model import CaptionModel
from lib.errors import UserError
from tests.caption_factory import write_captioner
from tiny.caption_checkpoint import save_model

LAYERS, VISION_LAYERS = 32, 63
SMALL = CaptionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_multi_query_heads=2,
    vocab_size=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
    vision_config=VisionConfig(
        hidden_size=16, intermediate_size=24, num_heads=2, image_size=32, patch_size=8, num_positions=17
    ),
)


def released_keys() -> set[str]:
    """Return the keys of the published checkpoint, written out."""
    keys = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(LAYERS):
        keys |= {
            f"model.layers.{layer}.{name}"
            for name in (
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
                "self_attn.language_expert_query_key_value.weight",
                "self_attn.language_expert_dense.weight",
                "self_attn.rotary_emb.inv_freq",
                "mlp.language_mlp.gate_proj.weight",
                "mlp.language_mlp.up_proj.weight",
                "mlp.language_mlp.down_proj.weight",
            )
        }
    for layer in range(VISION_LAYERS):
        keys |= {
            f"model.vision.transformer.layers.{layer}.{part}.{kind}"
            for part in (
                "input_layernorm",
                "attention.query_key_value",
                "attention.dense",
                "mlp.fc1",
                "mlp.fc2",
                "post_attention_layernorm",
            )
            for kind in ("weight", "bias")
        }
    keys |= {f"model.vision.{name}" for name in ("boi", "eoi", "conv.weight", "conv.bias")}
    keys |= {
        f"model.vision.patch_embedding.{name}"
        for name in ("cls_embedding", "proj.weight", "proj.bias", "position_embedding.weight")
    }
    keys |= {
        f"model.vision.linear_proj.{name}"
        for name in (
            "linear_proj.weight",
            "norm1.weight",
            "norm1.bias",
            "gate_proj.weight",
            "dense_h_to_4h.weight",
            "dense_4h_to_h.weight",
        )
    }
    return keys


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Save all 1029 tensors at small sizes, in bf16, in six shards with the released names."""
    torch.manual_seed(0)
    model = CaptionModel(SMALL).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("released")
    whole = sum(2 * math.prod(entry.shape) for entry in entries(model).values())
    save_model(model, folder, shard_bytes=math.ceil(whole / 5.8))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def rewrite(folder: Path, key: str, change) -> None:
    """Change the tensors of the shard with `key`; the index is kept."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][key]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_checkpoint_of_the_released_layout_loads_with_no_key_missing_or_unexpected(saved):
    shards = sorted(path.name for path in saved.glob("*.safetensors"))
    assert shards == [f"model-{place:05d}-of-00006.safetensors" for place in range(1, 7)]
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == released_keys() and len(index["weight_map"]) == 1029
    model = load_model(saved, dtype=torch.bfloat16)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    torch.manual_seed(0)
    original = CaptionModel(SMALL).to(torch.bfloat16)
    assert {n: t.dtype for n, t in model.state_dict().items()} == {
        n: t.dtype for n, t in original.state_dict().items()
    }
    assert all(
        torch.equal(tensor, model.state_dict()[name]) for name, tensor in original.state_dict().items()
    )


def test_a_loaded_model_is_saved_with_the_same_tensors(saved, tmp_path):
    save_model(load_model(saved, dtype=torch.bfloat16), tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    parts = {k: v for path in saved.glob("*.safetensors") for k, v in load_file(path).items()}
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in parts)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044 == 0o044
    assert read_config(tmp_path) == read_config(saved) == SMALL


def test_query_key_and_value_are_split_from_one_tensor(saved):
    model = load_model(saved, dtype=torch.bfloat16)
    parts = {k: v for path in saved.glob("*.safetensors") for k, v in load_file(path).items()}
    joined = parts["model.layers.7.self_attn.language_expert_query_key_value.weight"]
    attention = model.language.model.layers[7].self_attn
    assert joined.shape == (32 + 16 + 16, 32)
    assert torch.equal(attention.q_proj.weight, joined[:32])
    assert torch.equal(attention.k_proj.weight, joined[32:48])
    assert torch.equal(attention.v_proj.weight, joined[48:])


KEY = "model.vision.transformer.layers.40.mlp.fc1.weight"


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, KEY, lambda tensors: tensors.pop(KEY))
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert str(caught.value) == f"model is not a complete CogVLM2-Caption checkpoint: it is missing {KEY}."


def test_a_renamed_tensor_is_named_with_its_new_name(folder):
    rewrite(folder, KEY, lambda tensors: tensors.update({f"{KEY}.old": tensors.pop(KEY)}))
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert str(caught.value) == (
        f"model is not a complete CogVLM2-Caption checkpoint: it is missing {KEY} and it has "
        f"unknown {KEY}.old."
    )


def test_many_missing_tensors_are_counted(folder):
    rewrite(folder, KEY, lambda tensors: [tensors.pop(key) for key in sorted(tensors)[1:]])
    with pytest.raises(UserError, match=r"it is missing model\.\S+, \S+, \S+, \S+, \S+ and \d+ more\."):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    rewrite(folder, KEY, lambda tensors: tensors.update({KEY: tensors[KEY][:, :8].contiguous()}))
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert str(caught.value) == (
        f"model: {KEY} is torch.bfloat16 [24, 8]; according to config.json it should be a "
        "float tensor [24, 16]."
    )


def test_an_already_quantized_tensor_is_refused(folder):
    rewrite(folder, KEY, lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int8)}))
    with pytest.raises(UserError, match=r"fc1\.weight is torch\.int8 \[24, 16\]; according to config\.json"):
        load_model(folder)


def test_layers_with_different_frequencies_are_refused(folder):
    key = "model.layers.31.self_attn.rotary_emb.inv_freq"
    rewrite(folder, key, lambda tensors: tensors.update({key: tensors[key] * 2}))
    with pytest.raises(
        UserError, match=r"layers\.31\.self_attn\.rotary_emb\.inv_freq differs between layers"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
def test_a_damaged_or_absent_shard_is_an_error(folder, damage):
    damage(folder / "model-00003-of-00006.safetensors")
    with pytest.raises(UserError, match="model: the weights cannot be read: "):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{}"])
def test_a_damaged_index_is_an_error(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is a LlamaForCausalLM; captioning needs a CogVLMVideoFor"),
        ({"vision_config": None}, "config.json is not that of a CogVLM2-Caption"),
        ({"hidden_size": 30}, "hidden_size is 30, which is not a multiple of 8"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; this model has 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"num_hidden_layers": 33}, r"it is missing model\.layers\.32\."),
    ],
)
def test_a_config_of_another_model_is_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_frequencies_are_the_checkpoints_in_the_models_dtype(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in {folder / name for name in index["weight_map"].values()}:
        tensors = load_file(path)
        for key in tensors:
            if key.endswith("inv_freq"):
                tensors[key] = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.bfloat16)
        save_file(tensors, path)
    rotary = load_model(folder, dtype=torch.bfloat16).language.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.bfloat16 and rotary.inv_freq.tolist() == [1.0, 0.5, 0.25, 0.125]
    # 257 is 256 in bfloat16.
    cosine, _ = rotary(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[256, 257]]))
    assert torch.equal(cosine[0, 0], cosine[0, 1])


def test_the_end_tokens_of_generation_config_are_added(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert read_config(folder).eos_token_ids == (2, 9)


def test_the_released_model_has_12_508_billion_parameters():
    with torch.device("meta"):
        model = CaptionModel(CaptionConfig())
    found = entries(model)
    assert found.keys() == released_keys()
    assert round(sum(math.prod(entry.shape) for entry in found.values()) / 1e9, 3) == 12.508
    assert found["model.layers.0.self_attn.language_expert_query_key_value.weight"].shape == (6144, 4096)
    assert found["model.vision.conv.weight"].shape == (1792, 1792, 2, 2)
    assert found["model.layers.0.self_attn.rotary_emb.inv_freq"].shape == (64,)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    folder = write_captioner(tmp_path / "captioner")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zebra"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = read_config(folder).vocab_size
    with pytest.raises(UserError) as caught:
        load_captioner(folder, device="cpu", dtype=torch.float32)
    assert str(caught.value) == (
        f"captioner: tokenizer.json has token 5000, but the model's vocab_size is {words}."
    )
