"""Frames, pixel values, tokens and positions, compared with the original's code written out."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib.caption import inputs
from lib.caption.inputs import (
    MAX_FRAMES,
    MEAN,
    STD,
    Prompt,
    build_position_ids,
    build_prompt,
    choose_frames,
    clip_pixel_values,
    pad_left,
    pixel_values,
)

# Frames


def original_chat(timestamps: list[float]) -> list[int]:
    found = []
    for second in range(round(max(timestamps)) + 1):
        nearest = min(timestamps, key=lambda time: abs(time - second))
        found.append(timestamps.index(nearest))
        if len(found) >= 24:
            break
    return found


def original_base(count: int, fps: float) -> list[int]:
    return np.linspace(0, min(count, int(60 * fps)) - 1, 24, dtype=int).tolist()


def chosen(timestamps, sampling: str, *, fps: float) -> list[int]:
    times = np.asarray(timestamps, dtype=np.float64)
    found, used = choose_frames(times, fps=fps, duration=float(times[-1]) + 1 / fps, sampling=sampling)
    assert used == sampling
    assert found == sorted(set(found)) and len(found) <= MAX_FRAMES
    return found


@pytest.mark.parametrize("seed", range(20))
def test_chat_and_base_choose_the_originals_frames_without_repeats(seed):
    random = np.random.default_rng(seed)
    fps = float(random.choice([0.3, 1, 2, 8, 12.5, 23.976, 30, 60]))
    count = int(random.integers(1, 3000))
    times = np.arange(count) / fps
    if seed % 2:  # variable frame rate
        times = np.cumsum(random.exponential(1 / fps, count))
        times -= times[0]
    assert chosen(times, "chat", fps=fps) == sorted(set(original_chat(times.tolist())))
    assert chosen(times, "base", fps=fps) == sorted(set(original_base(count, fps)))


def test_of_a_long_clip_chat_covers_23_seconds_and_uniform_all():
    times = np.arange(90 * 30) / 30
    assert chosen(times, "chat", fps=30) == [30 * second for second in range(24)]
    evenly = chosen(times, "uniform", fps=30)
    assert len(evenly) == 24 and evenly[0] == 0 and evenly[-1] == 2699
    assert np.ptp(np.diff(evenly)) <= 1
    assert chosen(times, "base", fps=30)[-1] == 1799


@pytest.mark.parametrize("sampling", ["chat", "base", "uniform"])
def test_a_single_frame_is_chosen_once(sampling):
    assert chosen([0.0], sampling, fps=8) == [0]


def test_uniform_chooses_every_frame_of_a_clip_with_at_most_24():
    assert chosen(np.arange(9) / 8, "uniform", fps=8) == list(range(9))
    assert chosen(np.arange(24) / 8, "uniform", fps=8) == list(range(24))
    assert len(chosen(np.arange(25) / 8, "uniform", fps=8)) == 24


@pytest.mark.parametrize(
    ("seconds", "used"), [(0.5, "uniform"), (1.9, "uniform"), (2, "chat"), (24, "chat"), (25, "uniform")]
)
def test_auto_is_chat_unless_the_clip_is_short_or_long(seconds, used):
    times = np.arange(round(seconds * 10)) / 10
    found, sampling = choose_frames(times, fps=10, duration=seconds, sampling="auto")
    assert sampling == used
    assert found == choose_frames(times, fps=10, duration=seconds, sampling=used)[0]


def test_base_covers_the_complete_clip_if_the_frame_rate_is_unknown():
    found, _ = choose_frames(np.zeros(50), fps=0.0, duration=0.0, sampling="base")
    assert found[0] == 0 and found[-1] == 49 and len(found) == 24


# Pixel values


@pytest.mark.parametrize(("height", "width"), [(224, 224), (360, 640), (641, 353), (1080, 1920), (17, 400)])
def test_the_short_side_is_scaled_and_the_center_cropped(height, width):
    frame = np.zeros((height, width, 3), np.uint8)
    frame[height // 2, width // 2] = 255
    frame[:, : width // 2, 0] = 200  # red left half
    values = pixel_values(frame[None], 32)[0]
    assert values.shape == (3, 32, 32) and values.dtype == torch.float32
    red = values[0].mean(0)
    assert red[:14].min() > red[18:].max() + 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 8, 24])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(90, 131, 112), (64, 48, 32), (47, 85, 48), (40, 40, 24)]
)
def test_pixel_values_are_those_of_the_original(height, width, size, count, threads):
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    mean, std = (torch.tensor(numbers).view(3, 1, 1, 1) for numbers in (MEAN, STD))
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)  # torch's scaling may differ in the last bit
    try:
        clip = (torch.from_numpy(frames).permute(3, 0, 1, 2) / 255.0 - mean) / std
        short, long = sorted((height, width))
        scaled = {short: size, long: int(np.floor(long / short * size))} if short < long else {short: size}
        clip = F.interpolate(clip, size=(scaled[height], scaled[width]), mode="bilinear", align_corners=False)
        top, left = (round((scaled[side] - size) / 2.0) for side in (height, width))
        clip = clip[..., top : top + size, left : left + size].permute(1, 0, 2, 3)
        assert torch.equal(clip_pixel_values(iter(frames), size), clip)
    finally:
        torch.set_num_threads(usual)


def test_large_frames_are_scaled_in_chunks(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (7, 60, 80, 3), np.uint8)
    whole = clip_pixel_values(iter(frames), 48)
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 2 * 4 * 60 * 80 * 3)
    parts = clip_pixel_values(iter(frames), 48)
    assert parts.shape == (7, 3, 48, 48) and torch.allclose(parts, whole, atol=1e-6)


# Tokens and positions


def encode(text: str) -> list[int]:
    return [1000 + ord(character) for character in text]


def prompt(*, frames: int, template: str, tokens: int = 4) -> Prompt:
    return build_prompt(
        "Q?", frames=frames, template=template, tokens_per_frame=tokens, bos=1, pad=3, encode=encode
    )


def test_in_chat_a_frame_has_three_positions_and_one_for_its_number():
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
def test_frame_numbers_of_two_digits_are_language_tokens(frames):
    built = prompt(frames=frames, template="chat")
    assert (built.token_type_ids == 1).sum() == 4 * frames
    assert built.input_ids[built.token_type_ids == 1].unique().tolist() == [3]


def test_positions_are_those_of_the_original():
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


def test_shorter_prompts_are_padded_on_the_left_and_masked():
    short, long = prompt(frames=1, template="base"), prompt(frames=2, template="base")
    ids, types, positions, mask = pad_left([short, long], pad=9)
    assert ids.shape == (2, 11) and ids[0].tolist() == [9] * 4 + short.input_ids.tolist()
    assert mask.tolist() == [[0] * 4 + [1] * 7, [1] * 11]
    assert positions[0].tolist() == [0] * 4 + short.position_ids.tolist()
    assert types[0].tolist() == [0] * 4 + short.token_type_ids.tolist()
