"""lib/generation/prompts.py: the text encoder runs once for each text."""

from pathlib import Path

import pytest
import torch

from lib.generation import prompts
from lib.generation.prompts import PromptEncoder
from lib.models.specs import SPECS
from tiny.evaluate import load_generator

WEIGHTS = Path(__file__).resolve().parents[3] / "weights"


@pytest.fixture(scope="module")
def pipeline():
    return load_generator(WEIGHTS / "tiny-t2v").pipeline


@pytest.fixture
def runs(pipeline):
    """Return how often the text encoder has run, as a list that grows."""
    seen: list[int] = []
    hook = pipeline.text_encoder.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    yield seen
    hook.remove()


@pytest.fixture
def encoder(pipeline):
    return PromptEncoder(spec=SPECS["tiny-t2v"], pipeline=pipeline)


def test_embeddings_are_the_pipelines_own_bit_for_bit(encoder, pipeline):
    with torch.inference_mode():
        for _ in range(2):
            found = encoder.encode("a red circle", "a blue square")
            expected = pipeline.encode_prompt("a red circle", "a blue square", max_sequence_length=20)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_text_is_encoded_only_once_while_it_is_kept(encoder, runs):
    with torch.inference_mode():
        for prompt in ("a red circle", "a green circle", "a red circle"):
            encoder.encode(prompt, "")
    assert len(runs) == 3


def test_without_guidance_the_negative_prompt_is_not_encoded(encoder, runs):
    with torch.inference_mode():
        assert encoder.encode("a red circle", None)[1] is None
    assert len(runs) == 1


def test_the_most_recent_texts_and_the_empty_one_are_kept(encoder, runs, monkeypatch):
    monkeypatch.setattr(prompts, "KEPT", 3)
    with torch.inference_mode():
        for prompt in ("one", "two", "three", "four"):
            encoder.encode(prompt, "")
        assert len(runs) == 5
        encoder.encode("four", "")
        assert len(runs) == 5
        encoder.encode("one", "")
        assert len(runs) == 6
