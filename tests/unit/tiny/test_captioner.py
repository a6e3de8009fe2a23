"""tiny-caption's tokenizer and lessons."""

import numpy as np
import torch

from lib.caption.inputs import pixel_values
from lib.caption.model import CaptionModel
from tiny import loop, world
from tiny.caption_pool import FRAMES, CaptionPool, compress, normalised
from tiny.captioner import (
    ATTRIBUTE_QUESTIONS,
    CAPTION_QUESTIONS,
    UNKNOWN,
    build_caption_tokenizer,
    caption_config,
    sample_exchange,
)
from tiny.captions import canonical_caption
from tiny.judge import judge
from tiny.train_captioner import draw_lesson


def test_words_of_questions_and_captions_are_one_token_each_and_digits_are_single():
    tokenizer = build_caption_tokenizer()
    questions = [*CAPTION_QUESTIONS, *(q for qs in ATTRIBUTE_QUESTIONS.values() for q in qs)]
    for text in (*questions, *(canonical_caption(each) for each in world.ALL_COMBINATIONS)):
        assert UNKNOWN not in tokenizer.encode(text, add_special_tokens=False), text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("23", add_special_tokens=False)] == ["2", "3"]
    assert tokenizer.encode("RED", add_special_tokens=False) == tokenizer.encode(
        "red", add_special_tokens=False
    )
    assert tokenizer.encode("zebra", add_special_tokens=False) == [UNKNOWN]


def test_a_caption_survives_encoding_and_decoding():
    tokenizer = build_caption_tokenizer()
    for asked in world.ALL_COMBINATIONS[::17]:
        text = canonical_caption(asked)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_answers_are_captions_or_the_attribute_that_is_asked_for():
    rng, asked = np.random.default_rng(0), world.ALL_COMBINATIONS[40]
    for _ in range(200):
        question, answer = sample_exchange(asked, rng, easy=False)
        names = [name for name, questions in ATTRIBUTE_QUESTIONS.items() if question in questions]
        assert answer == (getattr(asked, names[0]) if names else canonical_caption(asked))


def test_compression_changes_pixels_but_not_what_a_clip_shows():
    asked = world.HELD_OUT_COMBINATIONS[3]
    frames = world.render(world.sample_scene(asked, np.random.default_rng(1)), 96, 128)
    small = compress(frames, quality=30)
    assert small.shape == frames.shape and (small != frames).any()
    assert all(judge(small).agreement(asked).values())


def test_a_pools_frames_become_what_the_preprocessing_gives():
    frame = np.random.default_rng(2).integers(0, 256, (48, 48, 3), np.uint8)
    assert torch.allclose(normalised(torch.from_numpy(frame)), pixel_values(frame[None], 48)[0], atol=1e-5)


def test_a_lesson_of_one_frame_says_that_nothing_moves():
    index = next(i for i, each in enumerate(world.TRAINED_COMBINATIONS) if each.motion == "left")
    pool = CaptionPool(
        frames=torch.zeros(1, FRAMES, 48, 48, 3, dtype=torch.uint8),
        length=torch.tensor([FRAMES]),
        combination=torch.tensor([index]),
    )
    tokenizer, worker = build_caption_tokenizer(), loop.Worker(rank=0, count=1, device="cpu")
    seen = set()
    for step in range(60):
        lesson = draw_lesson(pool, tokenizer, worker, easy=False, seed=0, step=step)
        count = lesson.frames.shape[1]
        seen.add(count)
        assert {each.motion for each in lesson.shown} == {"still" if count == 1 else "left"}
    assert {1, 2, 9, 24} <= seen


def test_the_model_is_the_services_own_class_at_a_small_size():
    model = CaptionModel(caption_config(len(build_caption_tokenizer())))
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1e6
