"""The OpenAPI document of a predictor, as Cog's own generator writes it.

coglet validates requests against `components.schemas.Input` (and `TrainingInput`) of this document and
serves it as /openapi.json; `cog build --openapi-schema FILE` accepts it.
"""

import json
from pathlib import Path
from typing import Any

from lib.serving.signature import FROM_COG, MISSING, SCALARS, InputField, Output, Signature, read_signature
from lib.storage.disk import replacing

TEMPLATE = Path(__file__).with_name("openapi.json")
"""Everything but inputs and outputs: the endpoints of predictions, their requests and responses."""
TRAINING_WORDS = {
    "prediction": "training",
    "Prediction": "Training",
    "predict": "train",
    "Predict": "Train",
    "schemas/Input": "schemas/TrainingInput",
    "schemas/Output": "schemas/TrainingOutput",
}
"""What differs in the endpoints of trainings."""
# Cog's name for an option of Input -> JSON schema's.
KEYWORDS = {
    "description": "description",
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
    "deprecated": "deprecated",
}


def openapi_schema(
    predictor: Path | None,
    *,
    name: str = "Runner",
    train: Path | None = None,
    train_name: str = "train",
) -> dict[str, Any]:
    """Return the document for class `name` in the file `predictor`, and for `train_name` in the file `train`.

    Raises SignatureError where Cog's static reader would lose something.
    """
    text = TEMPLATE.read_text(encoding="utf-8")
    document = json.loads(text)
    paths, schemas = document["paths"], document["components"]["schemas"]
    if predictor is None:
        document["paths"] = {path: paths[path] for path in paths if not path.startswith("/predictions")}
        schemas.clear()
    else:
        _add_signature(schemas, "", read_signature(predictor, name))
    if train is not None:
        for word, replacement in TRAINING_WORDS.items():
            text = text.replace(word, replacement)
        training = json.loads(text)
        document["paths"] |= training["paths"]
        schemas |= training["components"]["schemas"]
        _add_signature(schemas, "Training", read_signature(train, train_name))
    return document


def input_document(file: Path, *, name: str = "train") -> dict[str, Any]:
    """Return a document with only the inputs of class or function `name` in `file`, for the command line."""
    schemas: dict[str, Any] = {}
    _add_signature(schemas, "", read_signature(file, name))
    return {"components": {"schemas": schemas}}


def write_schema(path: Path, document: dict[str, Any]) -> None:
    """Write `document` to `path` in one step, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _add_signature(schemas: dict[str, Any], prefix: str, signature: Signature) -> None:
    """Add Input and Output, or TrainingInput and TrainingOutput."""
    schemas[f"{prefix}Input"] = _input_schema(schemas, prefix, signature.inputs)
    schemas[f"{prefix}Output"] = _output_schema(f"{prefix}Output", signature.output)


def _input_schema(schemas: dict[str, Any], prefix: str, inputs: list[InputField]) -> dict[str, Any]:
    properties = {}
    for item in inputs:
        choices = item.options.get("choices")
        if choices is None:
            properties[item.name] = _property(item) | {"title": _title(item.name)} | _type(item)
            continue
        enumeration = {
            "title": item.name,
            "description": "An enumeration.",
            "enum": choices,
            "type": SCALARS[item.type],
        }
        component = item.name
        if schemas.get(component, enumeration) != enumeration:
            # A training input with the name but not the choices of a prediction's.
            component = f"{prefix}{_title(item.name).replace(' ', '')}"
        schemas[component] = enumeration
        properties[item.name] = {"allOf": [_ref(component)]} | _property(item)
    document = {"title": f"{prefix}Input", "type": "object", "properties": properties}
    required = [item.name for item in inputs if item.required]
    return document | ({"required": required} if required else {})


def _property(item: InputField) -> dict[str, Any]:
    """Return a property without its type."""
    shape: dict[str, Any] = {} if item.default is MISSING else {"default": item.default}
    shape |= {KEYWORDS[option]: value for option, value in item.options.items() if option in KEYWORDS}
    if item.optional:
        shape["nullable"] = True
    return shape | {"x-order": item.order}


def _type(item: InputField) -> dict[str, Any]:
    return {"type": "array", "items": _scalar(item.type)} if item.repeated else _scalar(item.type)


def _scalar(name: str) -> dict[str, Any]:
    if name == "Secret":
        return {"type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True}
    if name in FROM_COG:
        return {"type": "string", "format": "uri"}
    return {"type": SCALARS[name]}


def _output_schema(title: str, output: Output) -> dict[str, Any]:
    if output.fields is not None:
        shape: dict[str, Any] = {"title": title, "type": "object", "properties": {}}
        for name, (kind, optional) in output.fields.items():
            nullable = {"nullable": True} if optional else {}
            shape["properties"][name] = {"title": _title(name)} | _scalar(kind) | nullable
        required = [name for name, (_, optional) in output.fields.items() if not optional]
        return shape | ({"required": required} if required else {})
    if output.repeated:
        iterator = {"x-cog-array-type": "iterator"} if output.iterator else {}
        return {"title": title, "type": "array", "items": _scalar(output.type or "str")} | iterator
    return {"title": title} | _scalar(output.type or "str")


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _title(name: str) -> str:
    return name.replace("_", " ").title()
