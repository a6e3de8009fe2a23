"""tiny-writer: the configuration of the language model, its tokenizer, and the exchanges that it learns."""

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lib.story.messages import prompt_request, story_request
from tiny.captions import canonical_caption, sample_caption
from tiny.ideas import sample_idea, sample_terse, storyboard_text
from tiny.world import ALL_COMBINATIONS

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 3000
TOKENIZER_IDEAS = 20_000
LONGEST = 512
"""Tokens of the longest exchange in training."""
CHAT_TEMPLATE = (
    "{%- for message in messages if message.role == 'user' %}{%- if loop.first %}"
    "<|im_start|>user\n{{ message.content }}<|im_end|>\n{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Only the first request counts: instructions before it and corrections after it are for large models."""


def build_writer(vocabulary: int) -> Qwen3ForCausalLM:
    """Return an untrained model of 2.6 million parameters."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"},
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def build_writer_tokenizer() -> Qwen2Tokenizer:
    """Build a byte-level BPE tokenizer, split as Qwen's is, from sampled exchanges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(7)
    texts = (text for _ in range(TOKENIZER_IDEAS) for text in sample_exchange(rng))
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = [tuple(pair) for pair in _merges(tokenizer)]
    built = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", model_max_length=LONGEST,
        extra_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    built.chat_template = CHAT_TEMPLATE
    return built


def sample_exchange(rng: np.random.Generator, *, easy: bool = False) -> tuple[str, str]:
    """Sample a request and the writer's answer: a storyboard in 75%, otherwise one prompt."""
    if easy or rng.random() < 0.75:
        parts = 1 if easy else int(rng.choice([1, 2, 3, 4], p=[0.25, 0.4, 0.25, 0.1]))
        idea = sample_terse(rng) if parts == 1 and rng.random() < 0.1 else sample_idea(rng, parts)
        scenes, wanted = idea.scenes, parts
        if not easy and rng.random() < 0.1:
            wanted = int(rng.integers(1, 6))
            scenes = (*scenes, *[scenes[-1]] * wanted)[:wanted]
        return story_request(idea.text, wanted), storyboard_text(scenes)
    kind = rng.random()
    if kind < 0.45:
        idea = sample_terse(rng)
    elif kind < 0.7:
        idea = sample_idea(rng, 1)
    else:
        scene = ALL_COMBINATIONS[int(rng.integers(len(ALL_COMBINATIONS)))]
        return prompt_request(sample_caption(scene, rng)), prompt_answer(canonical_caption(scene))
    return prompt_request(idea.text), prompt_answer(canonical_caption(idea.scenes[0]))


def prompt_answer(prompt: str) -> str:
    return f'{{"prompt":"{prompt}"}}'


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]
