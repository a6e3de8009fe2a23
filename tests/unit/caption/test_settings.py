"""What a request may ask of the captioner, and how it is loaded on which machine."""

import pytest

from lib.caption import precision
from lib.caption.captioner import CaptionSettings
from lib.caption.config import CaptionConfig
from lib.caption.precision import choose_precision
from lib.errors import UserError
from lib.memory.model import GIB
from lib.pipelines.machine import Machine


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": " "}, "prompt is empty; ask something, such as 'Please describe this video in detail.'"),
        ({"prompt": "caf\udce9"}, "prompt has bytes that are no text; send it in UTF-8"),
        (
            {"frame_sampling": "all"},
            "frame_sampling=all is unknown; allowed are auto, chat, base, uniform",
        ),
        ({"template": "poem"}, "template=poem is unknown; allowed are auto, chat, base, vqa"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range: 1 to 2048"),
        ({"max_new_tokens": 2049}, "max_new_tokens=2049 is out of range: 1 to 2048"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range: 0 to 5"),
        ({"temperature": float("nan")}, "temperature=nan is out of range: 0 to 5"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range: 0.01 to 1"),
        ({"seed": -1}, "seed=-1 is out of range: 0 to 9223372036854775807"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_with_what_is(given, message):
    with pytest.raises(UserError) as caught:
        CaptionSettings(**given)
    assert str(caught.value) == message


def gpu(gibibytes: float, dtype: str = "bfloat16") -> Machine:
    return Machine(device="cuda", free_bytes=int(gibibytes * GIB), dtype=dtype)


CPU = Machine(device="cpu", free_bytes=0, dtype="float32")


def test_a_large_gpu_takes_the_released_model_as_it_is():
    assert (
        str(choose_precision(CaptionConfig(), gpu(31)))
        == "cuda in bfloat16 (needs about 26.3 GiB, 31.0 GiB free)"
    )


def test_a_gpu_with_24_gb_takes_8_bits_if_bitsandbytes_is_there(monkeypatch):
    monkeypatch.setattr(precision, "available", lambda: True)
    chosen = choose_precision(CaptionConfig(), gpu(23))
    assert chosen.quantization == "8bit"
    assert str(chosen) == "cuda in bfloat16, weights in 8bit (needs about 15.6 GiB, 23.0 GiB free)"


def test_without_bitsandbytes_the_error_says_what_would_fit(monkeypatch):
    monkeypatch.setattr(precision, "available", lambda: False)
    with pytest.raises(UserError) as caught:
        choose_precision(CaptionConfig(), gpu(23))
    assert str(caught.value) == (
        "this model needs about 26.3 GiB, 23.0 GiB free. "
        "COGVIDEOX_QUANTIZATION=8bit needs 15.6 GiB, and bitsandbytes installed."
    )


def test_a_gpu_that_is_too_small_for_every_form_is_told_so(monkeypatch):
    monkeypatch.setattr(precision, "available", lambda: True)
    with pytest.raises(UserError, match=r"needs about 15\.6 GiB, 12\.0 GiB free\. Use a larger GPU\."):
        choose_precision(CaptionConfig(), gpu(12))


def test_asking_for_none_forbids_8_bits(monkeypatch):
    monkeypatch.setattr(precision, "available", lambda: True)
    monkeypatch.setenv("COGVIDEOX_QUANTIZATION", "none")
    with pytest.raises(UserError, match=r"needs about 26\.3 GiB"):
        choose_precision(CaptionConfig(), gpu(23))


def test_a_cpu_runs_in_float32_where_that_fits_and_in_bfloat16_otherwise(monkeypatch):
    monkeypatch.setattr(precision, "_free_system_bytes", lambda: 120 * GIB)
    assert choose_precision(CaptionConfig(), CPU).dtype == "float32"
    monkeypatch.setattr(precision, "_free_system_bytes", lambda: 40 * GIB)
    assert choose_precision(CaptionConfig(), CPU).dtype == "bfloat16"
    monkeypatch.setenv("COGVIDEOX_DTYPE", "float32")
    assert choose_precision(CaptionConfig(), CPU).dtype == "float32"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "COGVIDEOX_DTYPE",
            "int4",
            "COGVIDEOX_DTYPE=int4 is unknown; allowed are bfloat16, float16, float32.",
        ),
        (
            "COGVIDEOX_QUANTIZATION",
            "2bit",
            "COGVIDEOX_QUANTIZATION=2bit is unknown; allowed are 8bit, 4bit, none.",
        ),
    ],
)
def test_an_unknown_word_is_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        choose_precision(CaptionConfig(), CPU)
    assert str(caught.value) == message


def test_a_quantisation_without_bitsandbytes_says_how_to_get_it(monkeypatch):
    from lib.caption import quantization

    monkeypatch.setattr(quantization, "available", lambda: False)
    monkeypatch.setenv("COGVIDEOX_QUANTIZATION", "4bit")
    with pytest.raises(UserError, match=r"COGVIDEOX_QUANTIZATION=4bit needs bitsandbytes, which is not inst"):
        choose_precision(CaptionConfig(), CPU)
