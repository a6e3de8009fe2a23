"""The OpenAPI document of a predictor, as Cog's own generator writes it.

coglet validates requests against `components.schemas.Input` (and `TrainingInput`) of this document and
serves it as /openapi.json; `cog build --openapi-schema FILE` accepts it.
"""

import json
import os
from pathlib import Path
from typing import Any

from lib.serving.signature import FROM_COG, MISSING, SCALARS, InputField, Output, Signature, read_signature

STATUSES = ["starting", "processing", "succeeded", "canceled", "failed"]
WEBHOOK_EVENTS = ["start", "output", "logs", "completed"]
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
    predictor: Path, *, name: str = "Runner", train: Path | None = None, train_name: str = "train"
) -> dict[str, Any]:
    """Return the document for class `name` in the file `predictor`, and for `train_name` in the file `train`.

    Raises SignatureError where Cog's static reader would lose something.
    """
    schemas: dict[str, Any] = {}
    paths = _fixed_paths()
    _add_endpoint(schemas, paths, "prediction", read_signature(predictor, name))
    if train is not None:
        _add_endpoint(schemas, paths, "training", read_signature(train, train_name))
    schemas |= _fixed_schemas()
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def input_document(file: Path, *, name: str = "train") -> dict[str, Any]:
    """Return a document with only the inputs of class or function `name` in `file`, for the command line."""
    schemas: dict[str, Any] = {}
    _add_endpoint(schemas, {}, "prediction", read_signature(file, name))
    return {"components": {"schemas": schemas}}


def write_schema(path: Path, document: dict[str, Any]) -> None:
    """Write `document` to `path` in one step, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _add_endpoint(schemas: dict[str, Any], paths: dict[str, Any], kind: str, signature: Signature) -> None:
    """Add the four components and the paths of predictions or trainings."""
    noun = kind.capitalize()
    prefix = "" if kind == "prediction" else "Training"
    schemas[f"{prefix}Input"] = _input_schema(schemas, prefix, signature.inputs)
    schemas[f"{prefix}Output"] = _output_schema(f"{prefix}Output", signature.output)
    schemas[f"{noun}Request"] = _request_schema(noun, _ref(f"{prefix}Input"))
    schemas[f"{noun}Response"] = _response_schema(noun, _ref(f"{prefix}Input"), _ref(f"{prefix}Output"))
    paths |= _endpoint_paths(kind, noun)


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


def _request_schema(noun: str, input_ref: dict[str, Any]) -> dict[str, Any]:
    events = {"type": "array", "items": _ref("WebhookEvent"), "default": WEBHOOK_EVENTS}
    return {
        "title": f"{noun}Request",
        "type": "object",
        "properties": {
            "id": {"title": "Id", "type": "string"},
            "input": input_ref,
            "webhook": {"title": "Webhook", "type": "string", "format": "uri"},
            "webhook_events_filter": {"title": "Webhook Events Filter"} | events,
        },
    }


def _response_schema(noun: str, input_ref: dict[str, Any], output_ref: dict[str, Any]) -> dict[str, Any]:
    moments = ("created_at", "started_at", "completed_at")
    times = {name: {"title": _title(name), "type": "string", "format": "date-time"} for name in moments}
    return {
        "title": f"{noun}Response",
        "type": "object",
        "properties": {
            "input": input_ref,
            "output": output_ref,
            "id": {"title": "Id", "type": "string"},
            "version": {"title": "Version", "type": "string"},
            **times,
            "status": _ref("Status"),
            "error": {"title": "Error", "type": "string"},
            "logs": {"title": "Logs", "type": "string", "default": ""},
            "metrics": {"title": "Metrics", "type": "object"},
        },
    }


def _fixed_schemas() -> dict[str, Any]:
    location = {"title": "Location", "type": "array", "items": {"anyOf": [_scalar("str"), _scalar("int")]}}
    details = {"title": "Detail", "type": "array", "items": _ref("ValidationError")}
    return {
        "Status": _enumeration("Status", STATUSES),
        "WebhookEvent": _enumeration("WebhookEvent", WEBHOOK_EVENTS),
        "HTTPValidationError": {
            "title": "HTTPValidationError",
            "type": "object",
            "properties": {"detail": details},
        },
        "ValidationError": {
            "title": "ValidationError",
            "type": "object",
            "required": ["loc", "msg", "type"],
            "properties": {
                "loc": location,
                "msg": {"title": "Message", "type": "string"},
                "type": {"title": "Error Type", "type": "string"},
            },
        },
    }


def _fixed_paths() -> dict[str, Any]:
    return {
        "/": {"get": _operation("Root", "root__get")},
        "/health-check": {"get": _operation("Healthcheck", "healthcheck_health_check_get")},
        "/shutdown": {"post": _operation("Start Shutdown", "start_shutdown_shutdown_post")},
    }


def _endpoint_paths(kind: str, noun: str) -> dict[str, Any]:
    verb = {"prediction": "predict", "training": "train"}[kind]
    base, parameter = f"/{kind}s", f"{kind}_id"
    body = {"content": {"application/json": {"schema": _ref(f"{noun}Request")}}}
    create = {"description": f"Run a single {kind} on the model", "requestBody": body}
    where = {"name": parameter, "in": "path", "required": True}
    parameters = {"parameters": [where | {"schema": {"title": _title(parameter), "type": "string"}}]}
    reply = _ref(f"{noun}Response")
    operation_id = f"{verb}_{kind}s"
    return {
        base: {"post": create | _operation(verb.capitalize(), f"{operation_id}_post", reply)},
        f"{base}/{{{parameter}}}": {
            "put": create
            | parameters
            | _operation(f"{verb.capitalize()} Idempotent", f"{operation_id}_idempotent_put", reply)
        },
        f"{base}/{{{parameter}}}/cancel": {
            "post": parameters | _operation("Cancel", f"cancel_{kind}s__{parameter}__cancel_post", {})
        },
    }


def _operation(summary: str, operation_id: str, reply: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return one operation; those with a request (`reply` is not None) may answer 422."""
    responses = {"200": {"description": "Successful Response"} | _json(reply or {})}
    if reply is not None:
        responses["422"] = {"description": "Validation Error"} | _json(_ref("HTTPValidationError"))
    return {"summary": summary, "operationId": operation_id, "responses": responses}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _enumeration(title: str, values: list[str]) -> dict[str, Any]:
    return {"title": title, "description": "An enumeration.", "enum": values, "type": "string"}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _title(name: str) -> str:
    return name.replace("_", " ").title()
