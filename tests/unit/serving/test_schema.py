"""The OpenAPI document has the shapes of Cog's own generator."""

import json
from pathlib import Path

import pytest

from lib.serving.registry import predictors
from lib.serving.schema import openapi_schema, write_schema

PREDICTOR = """
from typing import Optional
from cog import BaseModel, BaseRunner, Input, Path, Secret

class TrainingOutput(BaseModel):
    weights: Path
    note: Optional[str]

class Runner(BaseRunner):
    def run(
        self,
        prompt: str = Input(description="words"),
        image: Optional[Path] = Input(default=None),
        steps: int = Input(description="steps", default=5, ge=1, le=10),
        scale: float = Input(default=6, ge=1, le=20.5),
        fmt: str = Input(choices=["mp4", "gif"], default="mp4"),
        loud: bool = False,
        token: Secret = Input(description="key"),
        files: list[Path] = Input(description="many"),
        code: str = Input(default="ab", min_length=1, max_length=3, regex="a.*"),
    ) -> Path: ...

def train(fmt: str = Input(choices=["zip", "tar"], default="zip"), steps: int = 9) -> TrainingOutput: ...
"""


@pytest.fixture
def sample(tmp_path) -> Path:
    file = tmp_path / "predict_sample.py"
    file.write_text(PREDICTOR)
    return file


def test_properties_have_cogs_shapes(sample):
    schemas = openapi_schema(sample)["components"]["schemas"]
    assert schemas["Input"] == {
        "title": "Input",
        "type": "object",
        "required": ["prompt", "token", "files"],
        "properties": {
            "prompt": {"description": "words", "title": "Prompt", "type": "string", "x-order": 0},
            "image": {
                "default": None,
                "format": "uri",
                "nullable": True,
                "title": "Image",
                "type": "string",
                "x-order": 1,
            },
            "steps": {
                "default": 5,
                "description": "steps",
                "maximum": 10,
                "minimum": 1,
                "title": "Steps",
                "type": "integer",
                "x-order": 2,
            },
            "scale": {
                "default": 6,
                "maximum": 20.5,
                "minimum": 1,
                "title": "Scale",
                "type": "number",
                "x-order": 3,
            },
            "fmt": {"allOf": [{"$ref": "#/components/schemas/fmt"}], "default": "mp4", "x-order": 4},
            "loud": {"default": False, "title": "Loud", "type": "boolean", "x-order": 5},
            "token": {
                "description": "key",
                "format": "password",
                "title": "Token",
                "type": "string",
                "writeOnly": True,
                "x-cog-secret": True,
                "x-order": 6,
            },
            "files": {
                "description": "many",
                "items": {"format": "uri", "type": "string"},
                "title": "Files",
                "type": "array",
                "x-order": 7,
            },
            "code": {
                "default": "ab",
                "maxLength": 3,
                "minLength": 1,
                "pattern": "a.*",
                "title": "Code",
                "type": "string",
                "x-order": 8,
            },
        },
    }
    assert schemas["fmt"] == {
        "title": "fmt",
        "description": "An enumeration.",
        "enum": ["mp4", "gif"],
        "type": "string",
    }
    assert schemas["Output"] == {"title": "Output", "type": "string", "format": "uri"}


def test_a_training_and_a_prediction_have_their_own_choices(sample):
    document = openapi_schema(sample, train=sample)
    schemas = document["components"]["schemas"]
    assert schemas["TrainingInput"]["properties"]["fmt"] == {
        "allOf": [{"$ref": "#/components/schemas/TrainingFmt"}],
        "default": "zip",
        "x-order": 0,
    }
    assert schemas["TrainingFmt"]["enum"] == ["zip", "tar"]
    assert schemas["fmt"]["enum"] == ["mp4", "gif"]
    assert schemas["TrainingOutput"] == {
        "title": "TrainingOutput",
        "type": "object",
        "required": ["weights"],
        "properties": {
            "weights": {"title": "Weights", "type": "string", "format": "uri"},
            "note": {"title": "Note", "type": "string", "nullable": True},
        },
    }
    assert "/trainings/{training_id}/cancel" in document["paths"]
    assert "/trainings" not in openapi_schema(sample)["paths"]


@pytest.mark.parametrize("name", predictors())
def test_every_predictors_document_is_complete(name):
    config = predictors()[name]
    document = openapi_schema(config.predictor, train=config.train)
    assert document["openapi"] == "3.0.2"
    assert {"/", "/health-check", "/predictions", "/predictions/{prediction_id}"} <= set(document["paths"])
    assert "/predictions/{prediction_id}/cancel" in document["paths"]
    schemas = document["components"]["schemas"]
    assert {"Input", "Output", "PredictionRequest", "PredictionResponse", "Status", "WebhookEvent"} <= set(
        schemas
    )
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    identifiers = [operation["operationId"] for operation in operations]
    assert len(identifiers) == len(set(identifiers))
    assert all(operation["responses"]["200"]["description"] for operation in operations)
    for path, methods in document["paths"].items():
        for operation in methods.values():
            declared = {parameter["name"] for parameter in operation.get("parameters", [])}
            assert declared == {part[1:-1] for part in path.split("/") if part.startswith("{")}


def test_the_video_inputs_keep_their_names_types_bounds_and_defaults():
    for name in ("t2v", "i2v"):
        shapes = openapi_schema(predictors()[name].predictor)["components"]["schemas"]["Input"]["properties"]
        steps, scale = shapes["num_inference_steps"], shapes["guidance_scale"]
        assert (steps["type"], steps["minimum"], steps["maximum"], steps["default"]) == (
            "integer",
            1,
            500,
            50,
        )
        assert (scale["type"], scale["minimum"], scale["maximum"], scale["default"]) == ("number", 1, 20, 6)
        assert shapes["num_frames"]["nullable"] and shapes["seed"]["nullable"]
        assert shapes["prompt"]["default"]


def test_the_file_is_written_in_one_step(sample, tmp_path):
    target = tmp_path / "new" / "schema.json"
    write_schema(target, openapi_schema(sample))
    assert json.loads(target.read_text()) == openapi_schema(sample)
    assert [path.name for path in target.parent.iterdir()] == ["schema.json"]


def references(node) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [found for value in node.values() for found in references(value)]
    return [found for value in node for found in references(value)] if isinstance(node, list) else []
