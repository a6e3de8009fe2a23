"""A checkpoint's components: of the classes, the type and the values that diffusers and transformers give."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from lib.pipelines.components import load_components

EMBEDDED = Path(__file__).resolve().parents[3] / "weights" / "tiny-t2v"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a copy of the embedded model that a test may change."""
    shutil.copytree(EMBEDDED, tmp_path / "model")
    return tmp_path / "model"


def test_every_component_has_the_requested_type_and_is_ready_for_inference():
    parts = load_components(EMBEDDED, dtype=torch.bfloat16)
    assert parts.keys() == {"transformer", "vae", "scheduler", "tokenizer", "text_encoder"}
    assert type(parts["scheduler"]).__name__ == "CogVideoXDDIMScheduler"
    for name in ("transformer", "vae", "text_encoder"):
        assert not parts[name].training, name
        assert {p.dtype for p in parts[name].parameters()} == {torch.bfloat16}, name
    assert type(parts["text_encoder"]) is T5EncoderModel
    assert type(parts["tokenizer"]) is T5Tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_text_encoder_in_several_files_computes_transformers_bits(folder, dtype):
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4}
    model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    shutil.rmtree(folder / "text_encoder")
    model.save_pretrained(folder / "text_encoder", max_shard_size="200KB")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 2

    reference = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    encoder = load_components(folder, dtype=dtype)["text_encoder"]

    ids = torch.randint(0, 200, (2, 40))
    with torch.inference_mode():
        assert torch.equal(encoder(ids)[0], reference(ids)[0])
    found = {name: weight.dtype for name, weight in encoder.named_parameters()}
    assert found == {name: weight.dtype for name, weight in reference.named_parameters()}


def test_variants_and_other_files_next_to_a_text_encoders_weights_are_not_read(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(zeros, weights.with_name("model.fp16.safetensors"))
    save_file(zeros, weights.with_name("old-00001-of-00002.safetensors"))
    encoder = load_components(folder, dtype=torch.float32)["text_encoder"]
    assert torch.equal(encoder.shared.weight, load_file(weights)["shared.weight"])


def test_without_the_text_encoder_neither_it_nor_the_tokenizer_is_there(folder):
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    parts = load_components(folder, dtype=torch.float32, text_encoder=False)
    assert parts["text_encoder"] is None
    assert parts["tokenizer"] is None


def test_the_classes_are_those_that_model_index_names(folder):
    index = folder / "model_index.json"
    document = json.loads(index.read_text()) | {"text_encoder": ["transformers", "UMT5EncoderModel"]}
    index.write_text(json.dumps(document))
    shutil.rmtree(folder / "text_encoder")
    sizes = {"vocab_size": 133, "d_model": 64, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    UMT5EncoderModel(UMT5Config(**sizes)).save_pretrained(folder / "text_encoder")
    parts = load_components(folder, dtype=torch.float32)
    assert type(parts["text_encoder"]) is UMT5EncoderModel


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_component_without_weights_is_an_error(folder, part):
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_components(folder, dtype=torch.float32)


def test_a_text_encoder_without_one_of_its_tensors_is_an_error(folder):
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match=r"it has no encoder\.final_layer_norm\.weight"):
        load_components(folder, dtype=torch.float32)


@pytest.mark.parametrize("stored", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_text_encoder_takes_its_embeddings_by_either_name_and_ignores_a_decoder(folder, stored):
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    embeddings = tensors.pop("shared.weight")
    save_file(tensors | {stored: embeddings, "decoder.final_layer_norm.weight": torch.ones(64)}, file)
    encoder = load_components(folder, dtype=torch.float32)["text_encoder"]
    assert torch.equal(encoder.shared.weight, embeddings)
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
