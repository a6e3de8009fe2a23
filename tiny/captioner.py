"""tiny-caption: the configuration of the captioner, its tokenizer, and the questions that it answers."""

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib.caption.config import CaptionConfig, VisionConfig
from tiny.captions import canonical_caption, vocabulary_words
from tiny.world import Attributes

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
BOS, EOS, PAD, UNKNOWN = range(4)
CAPTION_QUESTIONS = (
    "Please describe this video in detail.",
    "Describe this video.",
    "Please describe the video.",
    "What does this video show?",
    "What happens in this video?",
    "Write a caption.",
)
ATTRIBUTE_QUESTIONS = {
    "shape": ("What shape is it?", "Which shape does the video show?"),
    "colour": ("What colour is the shape?", "What color is it?"),
    "background": ("What colour is the background?", "Which background does the video have?"),
    "motion": ("Which way does it move?", "How does the shape move?"),
}
TEMPLATE_WORDS = "Question: Short Answer:"


def caption_config(vocabulary: int) -> CaptionConfig:
    """Return a configuration with frames of 48x48 in patches of 8, 11 tokens each; 0.9 million parameters."""
    return CaptionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_multi_query_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        vision_config=VisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_heads=4,
            image_size=48,
            patch_size=8,
            num_positions=37,
        ),
    )


def build_caption_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of lower-case words, single digits and punctuation; all else is unknown."""
    questions = [*CAPTION_QUESTIONS, *(q for qs in ATTRIBUTE_QUESTIONS.values() for q in qs), TEMPLATE_WORDS]
    splitting = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    words = {word for q in questions for word, _ in splitting.pre_tokenize_str(q.lower())}
    words |= set(vocabulary_words()) | set("0123456789.,?!:")
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitting
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def sample_exchange(attributes: Attributes, rng: np.random.Generator, *, easy: bool) -> tuple[str, str]:
    """Sample a question and its answer: a caption in 80%, otherwise one attribute; one question if `easy`."""
    if easy:
        return CAPTION_QUESTIONS[0], canonical_caption(attributes)
    if rng.random() < 0.8:
        question = CAPTION_QUESTIONS[0]
        if rng.random() < 0.5:
            question = CAPTION_QUESTIONS[rng.integers(len(CAPTION_QUESTIONS))]
        if rng.random() < 0.15:  # any other question is answered with a caption
            question = " ".join(["xyz"] * int(rng.integers(1, 12)))
        return question, canonical_caption(attributes)
    name = tuple(ATTRIBUTE_QUESTIONS)[rng.integers(4)]
    questions = ATTRIBUTE_QUESTIONS[name]
    return questions[rng.integers(len(questions))], getattr(attributes, name)
