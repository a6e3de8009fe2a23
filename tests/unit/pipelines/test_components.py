"""A checkpoint's parts, loaded one by one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lib.pipelines.components import load_components
from lib.pipelines.text_encoder import TextEncoder
from lib.pipelines.tokenizer import Tokenizer

EMBEDDED = Path(__file__).resolve().parents[3] / "weights" / "tiny-t2v"


def test_every_part_is_of_the_asked_type_and_ready_for_inference():
    parts = load_components(EMBEDDED, dtype=torch.bfloat16)
    assert parts.keys() == {"transformer", "vae", "scheduler", "tokenizer", "text_encoder"}
    assert type(parts["scheduler"]).__name__ == "CogVideoXDDIMScheduler"
    for name in ("transformer", "vae", "text_encoder"):
        assert not parts[name].training, name
        assert {p.dtype for p in parts[name].parameters()} == {torch.bfloat16}, name
    assert isinstance(parts["text_encoder"], TextEncoder)
    assert isinstance(parts["tokenizer"], Tokenizer)


def test_without_the_text_encoder_neither_it_nor_the_tokenizer_is_there(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    parts = load_components(folder, dtype=torch.float32, text_encoder=False)
    assert parts["text_encoder"] is None
    assert parts["tokenizer"] is None


def test_what_the_service_cannot_read_itself_is_transformers(tmp_path):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    shutil.rmtree(folder / "text_encoder")
    sizes = {"vocab_size": 133, "d_model": 64, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    T5EncoderModel(T5Config(**sizes, feed_forward_proj="relu")).save_pretrained(folder / "text_encoder")
    config = folder / "tokenizer" / "tokenizer_config.json"
    document = json.loads(config.read_text())
    del document["backend"]
    config.write_text(json.dumps(document))
    parts = load_components(folder, dtype=torch.float32)
    assert type(parts["text_encoder"]) is T5EncoderModel
    assert type(parts["tokenizer"]) is T5Tokenizer
    assert not parts["text_encoder"].training


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_part_without_weights_is_an_error(tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_components(folder, dtype=torch.float32)
