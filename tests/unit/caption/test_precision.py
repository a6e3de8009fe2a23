"""How the captioner is loaded depends on the free memory and the environment."""

import pytest

from lib import optional
from lib.caption.config import CaptionConfig
from lib.caption.precision import GIB, choose_precision, weight_bytes
from lib.errors import UserError
from lib.pipelines.machine import Machine
from tiny.captioner import caption_config


def gpu(gibibytes: float, dtype: str = "bfloat16") -> Machine:
    return Machine(device="cuda", free_bytes=int(gibibytes * GIB), dtype=dtype)


def cpu(gibibytes: float) -> Machine:
    return Machine(device="cpu", free_bytes=int(gibibytes * GIB), dtype="float32")


def test_a_large_gpu_loads_the_released_model_unquantized():
    assert (
        str(choose_precision(CaptionConfig(), gpu(31)))
        == "cuda in bfloat16 (needs about 26.3 GiB, 31.0 GiB free)"
    )


def test_a_gpu_with_24_gb_uses_int8_if_bitsandbytes_is_installed(monkeypatch):
    monkeypatch.setattr(optional, "available", lambda package: True)
    chosen = choose_precision(CaptionConfig(), gpu(23))
    assert chosen.quantization == "int8"
    assert str(chosen) == "cuda in bfloat16, weights in int8 (needs about 15.6 GiB, 23.0 GiB free)"


def test_without_bitsandbytes_the_error_names_what_would_fit(monkeypatch):
    monkeypatch.setattr(optional, "available", lambda package: False)
    with pytest.raises(UserError) as caught:
        choose_precision(CaptionConfig(), gpu(23))
    assert str(caught.value) == (
        "this model needs about 26.3 GiB, 23.0 GiB free. "
        "COGVIDEOX_QUANTIZATION=int8 needs 15.6 GiB, and bitsandbytes installed."
    )


def test_a_gpu_that_is_too_small_for_int8_needs_to_be_replaced(monkeypatch):
    monkeypatch.setattr(optional, "available", lambda package: True)
    with pytest.raises(UserError, match=r"needs about 15\.6 GiB, 12\.0 GiB free\. Use a larger GPU\."):
        choose_precision(CaptionConfig(), gpu(12))


def test_quantization_none_rules_out_int8(monkeypatch):
    monkeypatch.setattr(optional, "available", lambda package: True)
    monkeypatch.setenv("COGVIDEOX_QUANTIZATION", "none")
    with pytest.raises(UserError, match=r"needs about 26\.3 GiB"):
        choose_precision(CaptionConfig(), gpu(23))


def test_a_cpu_uses_float32_if_that_fits_and_bfloat16_otherwise(monkeypatch):
    assert choose_precision(CaptionConfig(), cpu(120)).dtype == "float32"
    assert choose_precision(CaptionConfig(), cpu(40)).dtype == "bfloat16"
    monkeypatch.setenv("COGVIDEOX_DTYPE", "float32")
    assert choose_precision(CaptionConfig(), cpu(40)).dtype == "float32"


def test_a_small_model_is_loaded_in_float32_whatever_memory_is_known_to_be_free():
    unknown = Machine(device="cpu", free_bytes=None, dtype="float32")
    assert str(choose_precision(caption_config(100), unknown)) == "cpu in float32 (CPU)"


@pytest.mark.parametrize("earlier", ["8bit", "int8"])
def test_the_earlier_spelling_of_a_quantization_is_accepted(monkeypatch, earlier):
    monkeypatch.setattr(optional, "available", lambda package: True)
    monkeypatch.setenv("COGVIDEOX_QUANTIZATION", earlier)
    assert choose_precision(CaptionConfig(), gpu(40)).quantization == "int8"


@pytest.mark.parametrize("video_only", ["int8-dynamic", "fp8", "fp8-dynamic"])
def test_a_quantization_for_video_alone_is_refused_with_those_for_captions(monkeypatch, video_only):
    monkeypatch.setenv("COGVIDEOX_QUANTIZATION", video_only)
    with pytest.raises(UserError) as caught:
        choose_precision(CaptionConfig(), cpu(40))
    assert str(caught.value) == (
        f"COGVIDEOX_QUANTIZATION={video_only} is not supported for captioning: use none, int8, int4."
    )


def test_a_quantization_without_bitsandbytes_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr(optional, "available", lambda package: False)
    monkeypatch.setenv("COGVIDEOX_QUANTIZATION", "4bit")
    with pytest.raises(UserError, match=r"COGVIDEOX_QUANTIZATION=int4 needs bitsandbytes, which is not inst"):
        choose_precision(CaptionConfig(), cpu(40))


def test_the_released_model_takes_the_memory_in_the_documentation():
    gigabytes = [weight_bytes(CaptionConfig(), "bfloat16", each) / 1e9 for each in ("none", "int8", "int4")]
    assert gigabytes == [
        pytest.approx(25.0, abs=0.05),
        pytest.approx(13.6, abs=0.1),
        pytest.approx(15, abs=0.2),
    ]
