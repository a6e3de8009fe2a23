"""T5 tokenizers in the layout of the released checkpoints load from requirements.txt alone."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def released_tokenizer(tmp_path_factory) -> Path:
    """Return a tokenizer folder in the released layout, around a small sentencepiece model."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
    text = [
        f"a {c} {s} moves left on a white background, number {n}"
        for c in colours
        for s in shapes
        for n in range(9)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "spiece"),
        vocab_size=80,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    size = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model")).vocab_size()
    extra = {f"<extra_id_{index}>": size + 99 - index for index in range(100)}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    order = {"0": "<pad>", "1": "</s>", "2": "<unk>", **{str(at): token for token, at in extra.items()}}
    decoder = {at: {"content": token, **plain, "special": True} for at, token in order.items()}
    config = {
        "add_prefix_space": True,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(extra),
        "clean_up_tokenization_spaces": True,
        **special,
        "extra_ids": 100,
        "legacy": True,
        "model_max_length": 226,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    }
    special_map = {name: {"content": token, **plain} for name, token in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps(extra))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": list(extra), **special_map})
    )
    return folder


@pytest.mark.parametrize("loader", ["T5Tokenizer", "AutoTokenizer"])
def test_a_released_tokenizer_folder_gives_the_ids_of_sentencepiece_and_eos(released_tokenizer, loader):
    import sentencepiece
    import transformers

    assert not (released_tokenizer / "tokenizer.json").exists()
    reference = sentencepiece.SentencePieceProcessor(str(released_tokenizer / "spiece.model"))
    tokenizer = getattr(transformers, loader).from_pretrained(released_tokenizer, local_files_only=True)
    texts = [
        "a red circle moves left on a white background",
        "A Green TRIANGLE, number 7!",
        "  two  blanks and an unknown sign: é 漢  ",
        "blue\tsquare\nyellow",
        "",
    ]
    for text in texts:
        assert tokenizer(text).input_ids == [*reference.encode(text), reference.eos_id()], text
    padded = tokenizer(texts[0], padding="max_length", max_length=64, truncation=True).input_ids
    assert len(padded) == 64 and padded[-1] == reference.pad_id()
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == reference.vocab_size() + 99
