"""Every text input has a maximum length, which the form and the code agree on."""

import pytest

from lib.caption.request import CaptionSettings, DatasetRequest
from lib.convert.request import model_request
from lib.errors import UserError
from lib.lora.source import take_choices
from lib.predictors.convert_files import CheckpointInput
from lib.serving.inputs import input_properties, parse_inputs
from lib.serving.registry import predictors
from lib.serving.schema import openapi_schema
from lib.text_limits import LIMITS, NAME, PROMPT, PROMPTS, check_length
from training.config import TrainingConfig

CONVERSION = {
    "direction": "to_diffusers", "family": "auto", "dtype": "auto", "vae_dtype": "auto",
    "text_encoder": False, "overrides": "", "hub_repository": "",
}  # fmt: skip
VAE = {"has_transformer": False, "has_vae": True}


def texts(document: dict, component: str) -> dict[str, dict]:
    shapes = input_properties(document, component).items()
    plain = {name: shape for name, shape in shapes if shape.get("type") == "string" and "enum" not in shape}
    return {name: shape for name, shape in plain.items() if shape.get("format") not in ("uri", "password")}


@pytest.mark.parametrize("name", predictors())
def test_every_text_input_of_a_predictor_has_its_limit(name):
    found = texts(openapi_schema(predictors()[name].predictor), "Input")
    assert {each: shape.get("maxLength") for each, shape in found.items()} == {
        each: LIMITS[each] for each in found
    }
    assert found


def test_every_text_input_of_the_trainer_has_a_limit():
    found = texts(
        openapi_schema(predictors()["i2v"].predictor, train=predictors()["i2v"].train), "TrainingInput"
    )
    limits = {name: shape.get("maxLength") for name, shape in found.items()}
    assert limits.pop("prior_prompts") == limits.pop("validation_prompt") == PROMPTS
    longer = ("trigger_word", "caption_prefix", "caption_suffix", "autocaption_prompt")
    assert {limits.pop(name) for name in longer} == {PROMPT}
    assert set(limits.values()) == {NAME} and "dataset_name" in limits


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("prompt", lambda text: CaptionSettings(prompt=text)),
        ("trigger_word", lambda text: DatasetRequest(settings=CaptionSettings(), trigger_word=text)),
        ("caption_suffix", lambda text: DatasetRequest(settings=CaptionSettings(), caption_suffix=text)),
        ("overrides", lambda text: model_request(CONVERSION | {"overrides": text}, **VAE)),
        ("vae_url", lambda text: CheckpointInput(name="vae", address=text)),
        ("lora_weights", lambda text: take_choices({"lora_weights": text})),
        ("dataset_name", lambda text: TrainingConfig.from_inputs(dataset_name=text)),
    ],
)  # fmt: skip
def test_a_longer_text_is_refused_without_cog(name, build):
    longest = LIMITS.get(name, NAME)
    with pytest.raises(UserError) as refused:
        build("x" * (longest + 1))
    assert str(refused.value) == f"{name} has {longest + 1:,} characters; at most {longest:,} are allowed."


def test_the_command_line_refuses_a_longer_text():
    document = openapi_schema(predictors()["t2v"].predictor)
    with pytest.raises(UserError, match=r"prompt has 10,001 characters; at most 10,000 are allowed"):
        parse_inputs([f"prompt={'x' * 10_001}"], document)
    assert len(parse_inputs([f"prompt={'x' * 10_000}"], document)["prompt"]) == 10_000


def test_the_longest_text_is_allowed():
    check_length("prompt", "x" * PROMPT)
