"""The environment variables: types, defaults, refusals, and their table in the docs."""

from pathlib import Path

import pytest

from lib.errors import UserError
from lib.settings import VARIABLES, current, markdown

ROOT = Path(__file__).resolve().parents[2]


def test_an_empty_environment_gives_the_defaults():
    settings = current({})
    assert settings.model == ""
    assert settings.offload is settings.quantization is settings.dtype is None
    assert settings.attention == "auto"
    assert not (settings.compile or settings.any_size or settings.local_sources)
    assert settings.cache == Path("~/.cache/cogvideox").expanduser()
    assert (settings.lora_cache_bytes, settings.latents_bytes) == (20 * 10**9, 200 * 10**9)
    assert settings.hub_endpoint == "https://huggingface.co"


def test_values_are_read_with_their_types():
    settings = current(
        {
            "COGVIDEOX_COMPILE": "1",
            "COGVIDEOX_LORA_CACHE_GB": "0.5",
            "COGVIDEOX_PARALLEL": " OFF ",
            "HF_ENDPOINT": "https://hub.example/",
        }
    )
    assert settings.compile
    assert settings.lora_cache_bytes == 500_000_000
    assert settings.parallel == "off"
    assert settings.hub_endpoint == "https://hub.example"


@pytest.mark.parametrize(("given", "meant"), [("8bit", "int8"), ("4bit", "int4"), ("fp8", "fp8"), ("", None)])
def test_quantization_has_one_vocabulary_and_earlier_spellings_still_work(given, meant):
    assert current({"COGVIDEOX_QUANTIZATION": given}).quantization == meant


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("COGVIDEOX_OFFLOAD", "disk", "allowed are resident, text, model, group, sequential"),
        ("COGVIDEOX_ATTENTION", "fast", "allowed are auto, native, cudnn, flash, flash3, sage"),
        ("COGVIDEOX_QUANTIZATION", "2bit", "allowed are none, int8, int8-dynamic, fp8, fp8-dynamic, int4"),
        ("COGVIDEOX_DTYPE", "int8", "allowed are float32, float16, bfloat16"),
        ("COGVIDEOX_COMPILE", "yes", "allowed are 0, 1"),
        ("COGVIDEOX_LOCAL_SOURCES", "true", "allowed are 0, 1"),
        ("COGVIDEOX_LATENTS_GB", "many", "is not a size in GB above 0; empty means 200"),
        ("COGVIDEOX_LORA_CACHE_GB", "-1", "is not a size in GB above 0; empty means 20"),
        ("COGVIDEOX_LORA_CACHE_GB", "nan", "is not a size in GB above 0; empty means 20"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(name, value, message):
    with pytest.raises(UserError, match=message) as refused:
        current({name: value})
    assert str(refused.value).startswith(f"{name}={value}")


def test_the_docs_have_the_table():
    assert markdown() in (ROOT / "docs" / "models.md").read_text()


def test_no_other_module_reads_a_variable_of_the_service():
    names = [each.name for each in VARIABLES if each.name.startswith("COGVIDEOX_")]
    readers = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("lib", "training")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "lib" / "settings.py"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if ("environ.get" in line or "getenv" in line) and any(name in line for name in names)
    ]
    assert readers == []
