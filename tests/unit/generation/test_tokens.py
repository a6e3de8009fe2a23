"""The service's tokenizer beside transformers'."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lib.pipelines.tokenizer import Tokenizer

EMBEDDED = Path(__file__).resolve().parents[3] / "weights" / "tiny-t2v" / "tokenizer"
TEXTS = [
    "",
    "   ",
    "a red circle moves right on a black background",
    "A  red\n\tCircle moves",
    "a zebra é 日本 </s> <pad> <unk> <extra_id_0>",
    "circle " * 40,
]


@pytest.fixture(scope="module")
def reference():
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(EMBEDDED, local_files_only=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "max_length", "max_length": 20, "truncation": True, "add_special_tokens": True},
        {"max_length": 5, "truncation": True, "add_special_tokens": False},
    ],
)
def test_token_numbers_are_transformers(reference, options):
    ours = Tokenizer.load(EMBEDDED)
    for text in TEXTS:
        assert ours(text, **options).input_ids == reference(text, **options).input_ids, text
    if "padding" in options:
        expected = reference(TEXTS, return_tensors="pt", **options).input_ids
        assert torch.equal(ours(TEXTS, return_tensors="pt", **options).input_ids, expected)


def test_several_texts_are_padded_to_the_longest_and_decoded_again(reference):
    ours = Tokenizer.load(EMBEDDED)
    expected = reference(TEXTS, padding="longest", return_tensors="pt").input_ids
    found = ours(TEXTS, padding="longest", return_tensors="pt").input_ids
    assert torch.equal(found, expected)
    assert ours.batch_decode(found) == reference.batch_decode(expected)


def test_what_only_transformers_can_read_is_left_to_it(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    document = json.loads(config.read_text())
    del document["backend"]  # as the released ones, with a sentencepiece model
    config.write_text(json.dumps(document))
    assert Tokenizer.load(tmp_path / "tokenizer") is None
    assert Tokenizer.load(tmp_path) is None
