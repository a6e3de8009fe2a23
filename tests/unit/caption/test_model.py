"""The native captioner against the original's inputs, features, logits and tokens (tests/data/caption)."""

import gzip
import json
import math
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lib.cancellation import Stopped
from lib.caption.checkpoint import load_model
from lib.caption.inputs import Prompt, build_prompt, pixel_values
from lib.caption.model import CaptionModel

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
    """Tokenize as in the cases: digits by threes, other characters one by one."""
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
    length = case.settings["max_new_tokens"]
    tokens = case.model.generate([case.own_prompt()], [case.pixels()], max_new_tokens=length)
    assert tokens == [case.expected["tokens"].tolist()]


@pytest.mark.parametrize("name", cases_of("torch.bfloat16"))
def test_in_bfloat16_every_token_that_rounding_cannot_change_is_the_originals(name, tmp_path):
    """Follow the original's tokens: generate one token after each prefix of them."""
    case = read_case(name, tmp_path)
    prompt, tokens = case.own_prompt(), case.expected["tokens"]
    columns = case.expected["vocab_columns"].tolist()
    decided = 0
    for step, logits in enumerate(case.expected["step_logits"]):
        [[token]] = case.model.generate([continued(prompt, tokens[:step])], [case.pixels()], max_new_tokens=1)
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


def test_a_batch_of_clips_of_different_lengths_gives_the_same_tokens_as_each_alone(small):
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
    alone = [
        small.model.generate([prompt], [clip], max_new_tokens=16)[0]
        for prompt, clip in zip(prompts, clips, strict=True)
    ]
    assert small.model.generate(prompts, clips, max_new_tokens=16) == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def test_above_temperature_0_tokens_are_sampled_and_a_seed_repeats_them(small):
    def sampled(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return small.model.generate(
            [small.own_prompt()], [small.pixels()], max_new_tokens=12, temperature=1.0, top_p=0.95
        )[0]

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(5)}) > 1


def test_very_low_temperatures_give_the_greedy_tokens(small):
    likeliest = small.expected["tokens"].tolist()
    for temperature in (1e-3, 1e-6, 1e-40):
        options = {"max_new_tokens": len(likeliest), "temperature": temperature, "top_p": 0.9}
        assert small.model.generate([small.own_prompt()], [small.pixels()], **options) == [likeliest]


def test_a_stop_ends_generation_between_two_tokens(small):
    stop, counts = threading.Event(), []

    def on_token(count: int) -> None:
        counts.append(count)
        if count == 3:
            stop.set()

    with pytest.raises(Stopped):
        small.model.generate(
            [small.own_prompt()], [small.pixels()], max_new_tokens=12, on_token=on_token, stop=stop
        )
    assert counts == [1, 2, 3]


def test_generation_ends_at_any_of_the_end_tokens(small, monkeypatch):
    tokens = small.expected["tokens"].tolist()
    config = replace(small.model.config, eos_token_id=[128001, tokens[4]])
    monkeypatch.setattr(small.model, "config", config)
    made = small.model.generate([small.own_prompt()], [small.pixels()], max_new_tokens=12)
    assert made == [tokens[:4]]
