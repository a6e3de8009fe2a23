"""The API of every predictor stays compatible with the committed documents.

A change that is not is committed on purpose, with `script/schema --all --output tests/data/schemas`.
"""

import copy
import json

import pytest

from lib.serving.compatibility import incompatibilities
from lib.serving.registry import PROJECT, predictors
from tests.sample_predictor import sample_document

COMMITTED = PROJECT / "tests" / "data" / "schemas"


def test_every_predictor_has_a_committed_document():
    assert sorted(path.stem for path in COMMITTED.iterdir()) == list(predictors())


@pytest.mark.parametrize("name", predictors())
def test_callers_of_the_committed_document_can_call_this_one(name):
    committed = json.loads((COMMITTED / f"{name}.json").read_text())
    assert incompatibilities(committed, predictors()[name].openapi()) == []


def test_trainings_are_in_the_committed_documents():
    for name, config in predictors().items():
        schemas = json.loads((COMMITTED / f"{name}.json").read_text())["components"]["schemas"]
        assert ("TrainingInput" in schemas) == (config.train is not None), name


@pytest.fixture
def old(tmp_path) -> dict:
    """A document with an input of every kind, as a prediction and as a training."""
    document = sample_document(tmp_path)
    schemas = document["components"]["schemas"]
    inputs = schemas["Input"]["properties"]
    inputs["prompt"] |= {"minLength": 1, "maxLength": 100}
    schemas["TrainingInput"] = copy.deepcopy(schemas["Input"])
    schemas["TrainingOutput"] = {
        "type": "object",
        "properties": {"weights": {"type": "string", "format": "uri"}, "loss": {"type": "number"}},
        "required": ["weights"],
    }
    return document


CHANGES = {
    "prompt is gone": lambda inputs, schemas: inputs.pop("prompt"),
    "steps: the type was {'type': 'integer'} and is {'type': 'number'}": lambda inputs, schemas: inputs[
        "steps"
    ].update(type="number"),
    "image: the type was {'type': 'string', 'format': 'uri'} and is {'type': 'string'}": (
        lambda inputs, schemas: inputs["image"].pop("format")
    ),
    "minimum was 1 and is 2": lambda inputs, schemas: inputs["steps"].update(minimum=2),
    "maximum was 500 and is 499": lambda inputs, schemas: inputs["steps"].update(maximum=499),
    "seed: maximum was not set and is 9": lambda inputs, schemas: inputs["seed"].update(maximum=9),
    "prompt: minLength was 1 and is 2": lambda inputs, schemas: inputs["prompt"].update(minLength=2),
    "prompt: maxLength was 100 and is 99": lambda inputs, schemas: inputs["prompt"].update(maxLength=99),
    "prompt: the pattern is a": lambda inputs, schemas: inputs["prompt"].update(pattern="a"),
    "seed: it can no longer be null": lambda inputs, schemas: inputs["seed"].pop("nullable"),
    "fmt: the choice gif is gone": lambda inputs, schemas: schemas["fmt"]["enum"].remove("gif"),
    "prompt: only a, b are allowed": lambda inputs, schemas: inputs["prompt"].update(enum=["a", "b"]),
    "steps is required": lambda inputs, schemas: schemas["Input"]["required"].append("steps"),
    "size is required": lambda inputs, schemas: (
        inputs.update(size={"type": "integer"}),
        schemas["Input"]["required"].append("size"),
    ),
}


@pytest.mark.parametrize("problem", CHANGES)
def test_a_restricted_input_is_reported(old, problem):
    new = copy.deepcopy(old)
    schemas = new["components"]["schemas"]
    CHANGES[problem](schemas["Input"]["properties"], schemas)
    found = incompatibilities(old, new)
    assert found and found[0].startswith("Input ") and problem in found[0]


def test_a_restricted_training_input_is_reported(old):
    new = copy.deepcopy(old)
    del new["components"]["schemas"]["TrainingInput"]["properties"]["steps"]
    assert incompatibilities(old, new) == ["TrainingInput steps is gone"]
    del new["components"]["schemas"]["TrainingInput"]
    assert incompatibilities(old, new) == ["TrainingInput is gone"]


@pytest.mark.parametrize(
    "change",
    [
        lambda schemas: schemas["Output"].update(type="number"),
        lambda schemas: schemas["Output"].pop("format"),
        lambda schemas: schemas["TrainingOutput"]["properties"].pop("loss"),
        lambda schemas: schemas["TrainingOutput"]["required"].remove("weights"),
        lambda schemas: schemas.pop("TrainingOutput"),
    ],
)
def test_a_changed_output_is_reported(old, change):
    new = copy.deepcopy(old)
    change(new["components"]["schemas"])
    assert len(incompatibilities(old, new)) == 1


def test_new_inputs_and_wider_bounds_are_compatible(old):
    new = copy.deepcopy(old)
    schemas = new["components"]["schemas"]
    inputs = schemas["Input"]["properties"]
    inputs["steps"] |= {"minimum": 0, "maximum": 900, "default": 30, "description": "Other words."}
    inputs["scale"].pop("maximum")
    inputs["prompt"]["maxLength"] = 101
    inputs["size"] = {"type": "integer", "default": 3}
    schemas["fmt"]["enum"].append("webm")
    schemas["Input"]["required"].remove("image")
    assert incompatibilities(old, new) == []
