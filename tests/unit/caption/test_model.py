"""The native captioner against the original's inputs, features, logits and tokens (tests/data/caption)."""

import gzip
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from lib.cancellation import Stopped
from lib.caption import preprocessing
from lib.caption.checkpoint import load_model
from lib.caption.model import CaptionModel, Decoding
from lib.caption.preprocessing import MEAN, STD, clip_pixel_values, pixel_values
from lib.caption.prompt import Prompt, build_prompt

CASES = Path(__file__).resolve().parents[2] / "data" / "caption"
BF16_LEAD_STEPS = 3
"""How far behind the original's best logit our token may lie, in bfloat16 steps of that logit.

Measured with the AVX2, AVX-512 and AVX512-BF16 kernels, every logit of that magnitude (4 to 8, so a step is
1/32) is within one step of the original's: two logits can exchange their order where one leads by two steps
or fewer. One more is allowed for other processors; torch's generic kernels need it. All logits, the small
ones included, are within 0.2 (see the test of every step's logits).
"""


def cases_of(dtype: str) -> list[str]:
    paths = sorted(CASES.iterdir())
    return [path.name for path in paths if json.loads((path / "case.json").read_text())["dtype"] == dtype]


@dataclass(frozen=True, kw_only=True)
class Case:
    model: CaptionModel
    settings: dict
    expected: dict[str, torch.Tensor]
    dtype: torch.dtype

    def prompt(self, question: str, *, frames: int, template: str) -> Prompt:
        config = self.model.config
        return build_prompt(
            question,
            frames=frames,
            template=template,
            tokens_per_frame=config.vision_config.tokens,
            bos=config.bos_token_id,
            pad=config.pad_token_id,
            encode=encode,
        )

    def own_prompt(self) -> Prompt:
        frames = self.expected["frames"].shape[1]
        return self.prompt(self.settings["prompt"], frames=frames, template=self.settings["template"])

    def pixels(self) -> torch.Tensor:
        frames = self.expected["frames"].permute(1, 2, 3, 0).numpy()
        size = self.model.config.vision_config.image_size
        return pixel_values(frames, size)


def encode(text: str) -> list[int]:
    """The tokenizer that the cases were made with: digits by threes, other characters one by one."""
    parts = re.findall(r"\d{1,3}|\D", text)
    return [1000 + int(part) if part.isdigit() else 3000 + ord(part) % 256 for part in parts]


@pytest.fixture(scope="module", params=sorted(path.name for path in CASES.iterdir()))
def case(request, tmp_path_factory) -> Case:
    return read_case(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Case:
    return read_case("base-fp32", tmp_path_factory.mktemp("model"))


def read_case(name: str, folder: Path) -> Case:
    source = CASES / name
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = gzip.decompress((source / "model.safetensors.gz").read_bytes())
    (folder / "model.safetensors").write_bytes(weights)
    settings = json.loads((source / "case.json").read_text())
    dtype = getattr(torch, settings["dtype"].removeprefix("torch."))
    return Case(
        model=load_model(folder, dtype=dtype),
        settings=settings,
        expected=load_file(source / "expected.safetensors"),
        dtype=dtype,
    )


def test_there_are_cases_of_every_template_and_both_types():
    settings = [json.loads((path / "case.json").read_text()) for path in CASES.iterdir()]
    assert {each["template"] for each in settings} == {"base", "chat", "vqa"}
    assert {each["dtype"] for each in settings} == {"torch.float32", "torch.bfloat16"}


def test_frames_become_the_originals_pixel_values(case):
    assert torch.equal(case.pixels().to(case.dtype), case.expected["pixel_values"])


def test_ids_types_and_positions_are_the_originals(case):
    prompt = case.own_prompt()
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert torch.equal(getattr(prompt, name)[None], case.expected[name]), name


def test_vision_tokens_and_logits_are_the_originals(case):
    with torch.inference_mode():
        seen = case.model.see(case.pixels())
        inputs = case.model.embed([case.own_prompt()], [case.pixels()])
        logits = case.model.language(**inputs, use_cache=False).logits[0, -1].float()
    assert seen.dtype == case.dtype
    off = seen.float() - case.expected["vision"].float()
    if case.dtype == torch.float32:
        assert off.abs().max() < 1e-4
    else:  # rounded differently by every processor: 0.001 with AVX2 and AVX-512, 0.015 with generic kernels
        assert off.norm() < 0.03 * case.expected["vision"].float().norm()
    logit = 1e-4 if case.dtype == torch.float32 else 0.2
    difference = logits[case.expected["vocab_columns"]] - case.expected["prefill_last_logits"][0]
    assert difference.abs().max() < logit


@pytest.mark.parametrize("name", cases_of("torch.float32"))
def test_every_generated_token_is_the_originals(name, tmp_path):
    case = read_case(name, tmp_path)
    decoding = Decoding(max_new_tokens=case.settings["max_new_tokens"])
    tokens = case.model.generate([case.own_prompt()], [case.pixels()], decoding)
    assert tokens == [case.expected["tokens"].tolist()]


@pytest.mark.parametrize("name", cases_of("torch.bfloat16"))
def test_in_bfloat16_every_token_that_rounding_cannot_change_is_the_originals(name, tmp_path):
    """Follow the original's tokens: generate one token after each prefix of them."""
    case = read_case(name, tmp_path)
    prompt, tokens = case.own_prompt(), case.expected["tokens"]
    columns = case.expected["vocab_columns"].tolist()
    decided = 0
    for step, logits in enumerate(case.expected["step_logits"]):
        [[token]] = case.model.generate(
            [continued(prompt, tokens[:step])], [case.pixels()], Decoding(max_new_tokens=1)
        )
        best, second = logits.topk(2).values.tolist()
        allowed = BF16_LEAD_STEPS * bfloat16_step(best)
        assert best - logits[columns.index(token)].item() <= allowed, f"step {step}"
        if best - second > allowed:
            assert token == tokens[step]
            decided += 1
    assert decided > len(tokens) / 2


def continued(prompt: Prompt, tokens: torch.Tensor) -> Prompt:
    """Return the prompt followed by an answer's first tokens."""
    positions = prompt.position_ids[-1] + 1 + torch.arange(len(tokens))
    return Prompt(
        input_ids=torch.cat([prompt.input_ids, tokens]),
        token_type_ids=torch.cat([prompt.token_type_ids, torch.zeros_like(tokens)]),
        position_ids=torch.cat([prompt.position_ids, positions]),
    )


def bfloat16_step(value: float) -> float:
    """Return the distance between neighbouring bfloat16 numbers of this magnitude (8 bits of mantissa)."""
    return 2.0 ** (math.floor(math.log2(abs(value))) - 7)


def test_the_logits_of_every_step_are_the_originals(case):
    tolerance = 1e-4 if case.dtype == torch.float32 else 0.2
    tokens = case.expected["tokens"]
    with torch.inference_mode():
        inputs = case.model.embed([case.own_prompt()], [case.pixels()])
        later = case.model.language.get_input_embeddings()(tokens[None, :-1])
        positions = inputs["position_ids"][:, -1:] + torch.arange(1, len(tokens))[None]
        logits = case.model.language(
            inputs_embeds=torch.cat([inputs["inputs_embeds"], later], dim=1),
            attention_mask=torch.ones(1, inputs["attention_mask"].shape[1] + len(tokens) - 1),
            position_ids=torch.cat([inputs["position_ids"], positions], dim=1),
            use_cache=False,
        ).logits[0, -len(tokens) :, case.expected["vocab_columns"]]
    assert (logits.float() - case.expected["step_logits"]).abs().max() < tolerance


def test_clips_of_different_lengths_together_give_the_same_tokens_as_one_by_one(small):
    random = np.random.default_rng(4)
    size = small.model.config.vision_config.image_size
    prompts, clips = [], []
    for frames, template, question in (
        (1, "base", "What?"),
        (7, "chat", "Please describe this video in detail."),
        (3, "vqa", "Which way does it move, and how far?"),
        (12, "chat", "?"),
        (2, "base", "Describe."),
    ):
        prompts.append(small.prompt(question, frames=frames, template=template))
        clips.append(pixel_values(random.integers(0, 256, (frames, 40, 56, 3), np.uint8), size))
    decoding = Decoding(max_new_tokens=16)
    alone = [
        small.model.generate([prompt], [clip], decoding)[0]
        for prompt, clip in zip(prompts, clips, strict=True)
    ]
    assert small.model.generate(prompts, clips, decoding) == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_a_temperature_draws_tokens_and_a_seed_repeats_them(small):
    decoding = Decoding(max_new_tokens=12, temperature=1.0, top_p=0.95)

    def drawn(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return small.model.generate([small.own_prompt()], [small.pixels()], decoding)[0]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1


def test_the_lowest_temperatures_take_the_likeliest_tokens(small):
    likeliest = small.expected["tokens"].tolist()
    for temperature in (1e-3, 1e-6, 1e-40):
        decoding = Decoding(max_new_tokens=len(likeliest), temperature=temperature, top_p=0.9)
        assert small.model.generate([small.own_prompt()], [small.pixels()], decoding) == [likeliest]


def test_generation_ends_at_the_end_token_and_between_two_tokens_when_told(small):
    import threading

    tokens = small.expected["tokens"].tolist()
    stop, heard = threading.Event(), []

    def on_token(count: int) -> None:
        heard.append(count)
        if count == 3:
            stop.set()

    with pytest.raises(Stopped):
        small.model.generate(
            [small.own_prompt()], [small.pixels()], Decoding(max_new_tokens=12), on_token=on_token, stop=stop
        )
    assert heard == [1, 2, 3]
    ended = small.model
    original = ended.config
    try:
        from dataclasses import fields

        values = {field.name: getattr(original, field.name) for field in fields(original)}
        ended.config = type(original)(**values | {"eos_token_id": [128001, tokens[4]]})
        assert ended.generate([small.own_prompt()], [small.pixels()], Decoding(max_new_tokens=12)) == [
            tokens[:4]
        ]
    finally:
        ended.config = original


@pytest.mark.parametrize(("height", "width"), [(224, 224), (360, 640), (641, 353), (1080, 1920), (17, 400)])
def test_preprocessing_scales_the_short_side_and_takes_the_middle(height, width):
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
def test_a_clips_frames_become_what_the_original_makes_of_all_at_once(height, width, size, count, threads):
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    mean, std = (torch.tensor(numbers).view(3, 1, 1, 1) for numbers in (MEAN, STD))
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)  # torch has more than one way to scale, which differ in the last bit
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


def test_large_frames_are_scaled_a_few_at_a_time(monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (7, 60, 80, 3), np.uint8)
    whole = clip_pixel_values(iter(frames), 48)
    monkeypatch.setattr(preprocessing, "AT_ONCE_BYTES", 2 * 4 * 60 * 80 * 3)
    parts = clip_pixel_values(iter(frames), 48)
    assert parts.shape == (7, 3, 48, 48) and torch.allclose(parts, whole, atol=1e-6)
