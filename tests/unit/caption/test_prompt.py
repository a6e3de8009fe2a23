"""Positions and padding of prompts, beyond the original's cases."""

import pytest
import torch

from lib.caption.prompt import Prompt, build_position_ids, build_prompt, pad_left


def encode(text: str) -> list[int]:
    return [1000 + ord(character) for character in text]


def prompt(*, frames: int, template: str, tokens: int = 4) -> Prompt:
    return build_prompt(
        "Q?", frames=frames, template=template, tokens_per_frame=tokens, bos=1, pad=3, encode=encode
    )


def test_chat_numbers_the_frames_and_every_frame_takes_three_positions_and_one_for_its_number():
    built = prompt(frames=2, template="chat")
    digits = encode("0") + encode("1")
    text = encode("Question: Q? Answer:")
    assert built.input_ids.tolist() == [1, 3, 3, 3, 3, digits[0], 3, 3, 3, 3, digits[1], *text]
    assert built.position_ids[:11].tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8]
    assert built.position_ids[11:].tolist() == list(range(9, 9 + len(text)))


def test_in_base_all_frames_between_the_first_and_last_token_share_a_position():
    built = prompt(frames=3, template="base")
    assert built.position_ids.tolist() == [0, 1, *[2] * 10, 3, 4, 5]
    assert built.input_ids[-2:].tolist() == encode("Q?")


def test_vqa_asks_for_a_short_answer():
    built = prompt(frames=1, template="vqa")
    assert built.input_ids[5:].tolist() == encode("Question: Q? Short answer:")


@pytest.mark.parametrize("frames", [10, 12, 24])
def test_numbers_of_two_digits_are_language(frames):
    built = prompt(frames=frames, template="chat")
    assert (built.token_type_ids == 1).sum() == 4 * frames
    assert built.input_ids[built.token_type_ids == 1].unique().tolist() == [3]


def test_positions_of_types_as_the_original_computes_them():
    random = torch.Generator().manual_seed(1)
    for _ in range(50):
        types = torch.randint(0, 2, (40,), generator=random)
        types[0] = 0
        inner = [
            bool(types[i]) and bool(types[i - 1]) and i + 1 < 40 and bool(types[i + 1]) for i in range(40)
        ]
        position, expected = 0, [0]
        for i in range(1, 40):
            position += not (inner[i] and inner[i - 1])
            expected.append(position)
        assert build_position_ids(types).tolist() == expected


def test_shorter_prompts_are_filled_at_the_left_and_masked():
    short, long = prompt(frames=1, template="base"), prompt(frames=2, template="base")
    ids, types, positions, mask = pad_left([short, long], pad=9)
    assert ids.shape == (2, 11) and ids[0].tolist() == [9] * 4 + short.input_ids.tolist()
    assert mask.tolist() == [[0] * 4 + [1] * 7, [1] * 11]
    assert positions[0].tolist() == [0] * 4 + short.position_ids.tolist()
    assert types[0].tolist() == [0] * 4 + short.token_type_ids.tolist()
