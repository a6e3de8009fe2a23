"""A T5 tokenizer of words: lower-case ones first, then the same words capitalised.

Captions are lower-cased for training, so only the lower-case rows of the embedding are trained, and
`tie_capitals` copies them to the capitalised rows when the models are exported. (A lower-casing normalizer
would be lost when transformers reloads the tokenizer.)
"""

import torch
from transformers import T5Tokenizer

from tiny.captions import vocabulary_words
from tiny.networks import TEXT_TOKENS

SPECIAL = ("<pad>", "</s>", "<unk>")
PUNCTUATION = (".", ",")


def build_tokenizer() -> T5Tokenizer:
    words = vocabulary_words()
    pieces = ["▁" + word for word in words] + list(PUNCTUATION)
    pieces += ["▁" + word.capitalize() for word in words if word != word.capitalize()]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)] + [(piece, -1.0) for piece in pieces]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_TOKENS)


def encode(tokenizer: T5Tokenizer, captions: list[str]) -> torch.Tensor:
    """Return ids [batch, TEXT_TOKENS], padded as by the pipelines."""
    return tokenizer(
        [c.lower() for c in captions],
        padding="max_length",
        max_length=TEXT_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids


@torch.no_grad()
def tie_capitals(embedding: torch.nn.Embedding, tokenizer: T5Tokenizer) -> None:
    """Give every capitalised word the embedding of the lower-case one."""
    ids = tokenizer.get_vocab()
    for piece, index in ids.items():
        lower = ids.get(piece.lower())
        if lower is not None and lower != index:
            embedding.weight[index] = embedding.weight[lower]
