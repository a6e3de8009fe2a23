"""Command-line inputs: `name=value` converted to the types of the schema, and the help made from it."""

import base64
import difflib
import math
import mimetypes
import textwrap
from pathlib import Path
from typing import Any

from lib.errors import SHOWN_CHARACTERS, UserError, cut, shown

BOOLEANS = {
    "true": True,
    "yes": True,
    "1": True,
    "on": True,
    "false": False,
    "no": False,
    "0": False,
    "off": False,
}


def parse_inputs(pairs: list[str], document: dict[str, Any], *, send_files: bool = True) -> dict[str, Any]:
    """`["seed=7", "image=@photo.jpg"]` -> `{"seed": 7, "image": "data:image/jpeg;base64,..."}`.

    Types follow the schema. Text is kept as it is; an empty value of any other type leaves the input out. An
    input that takes a list may be repeated. Without `send_files` a file stays a path, for code that runs in
    this process. Raises UserError for what the server would refuse or ignore: unknown names, wrong types,
    values out of bounds, missing inputs, unreadable files.
    """
    properties = input_properties(document)
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"-i {cut(pair)}: write name=value")
        if name not in properties:
            raise UserError(_unknown(name, list(properties)))
        shape = properties[name]
        if shape.get("type") == "array":
            values.setdefault(name, []).append(_convert(name, text, shape["items"], send_files))
        elif text or (shape["type"] == "string" and not shape.get("nullable")):
            values[name] = _convert(name, text, shape, send_files)
    missing = [
        name for name in document["components"]["schemas"]["Input"].get("required", []) if name not in values
    ]
    if missing:
        raise UserError(f"missing: {', '.join(missing)} (give it with {'-i ' * send_files}{missing[0]}=...)")
    return values


def input_properties(document: dict[str, Any], component: str = "Input") -> dict[str, dict[str, Any]]:
    """Return each input's property with references resolved, in the order of the form."""
    schemas = document["components"]["schemas"]
    resolved = {}
    for name, shape in schemas[component].get("properties", {}).items():
        merged = {key: value for key, value in shape.items() if key != "allOf"}
        for part in shape.get("allOf", []):
            target = schemas[part["$ref"].rpartition("/")[2]]
            merged |= {"type": target["type"], "enum": target["enum"]}
        resolved[name] = merged
    return dict(sorted(resolved.items(), key=lambda item: item[1].get("x-order", 0)))


def describe_inputs(document: dict[str, Any]) -> str:
    """Return all inputs with type, bounds, default and description, for --help."""
    required = document["components"]["schemas"]["Input"].get("required", [])
    blocks = []
    for name, shape in input_properties(document).items():
        facts = [_type_name(shape)]
        if "minimum" in shape or "maximum" in shape:
            facts.append(f"{shape.get('minimum', '')}..{shape.get('maximum', '')}")
        if "enum" in shape:
            facts.append(" | ".join(str(choice) for choice in shape["enum"]))
        facts.append(_default_text(shape, name in required))
        text = textwrap.fill(
            shape.get("description", ""), 96, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
        blocks.append(f"  {name}  ({', '.join(facts)})" + (f"\n{text}" if text else ""))
    return "\n".join(blocks)


def data_uri(path: Path) -> str:
    """Return the file as a data URI, typed by its name. Raises UserError when it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _convert(name: str, text: str, shape: dict[str, Any], send_files: bool) -> Any:
    kind = shape["type"]
    if kind == "string":
        value: Any = text
        if shape.get("format") == "uri":
            value = _file(name, text) if send_files else text.removeprefix("@")
    elif kind == "boolean":
        value = BOOLEANS.get(text.lower())
        if value is None:
            raise UserError(f"{name}: {cut(text)} is not true or false")
    else:
        value = _number(name, text, kind)
    _check(name, value, shape)
    return value


def _number(name: str, text: str, kind: str) -> int | float:
    try:
        return int(text) if kind == "integer" else float(text)
    except ValueError:
        wanted = "a whole number" if kind == "integer" else "a number"
        raise UserError(f"{name}: {text} is not {wanted}") from None


def _file(name: str, text: str) -> str:
    if text.startswith("@"):
        return data_uri(Path(text[1:]).expanduser())
    if "://" not in text and text[:5].lower() != "data:":
        if len(text) > SHOWN_CHARACTERS:
            raise UserError(f"{name}: {shown(text)} is no address; write @FILE to send a file, or give a URL")
        raise UserError(f"{name}: write @{text} to send the file, or give a URL")
    return text


def _check(name: str, value: Any, shape: dict[str, Any]) -> None:
    """Raise UserError where the server would refuse the value, in its words."""
    if "enum" in shape and value not in shape["enum"]:
        raise UserError(f"{name}: {shown(value)} is not one of {', '.join(map(str, shape['enum']))}")
    if isinstance(value, str) and len(value) > shape.get("maxLength", math.inf):
        raise UserError(f"{name} has {len(value):,} characters; at most {shape['maxLength']:,} are allowed")
    if "minimum" in shape and not value >= shape["minimum"]:
        raise UserError(f"{name}: {value} is less than the minimum of {shape['minimum']}")
    if "maximum" in shape and not value <= shape["maximum"]:
        raise UserError(f"{name}: {value} is greater than the maximum of {shape['maximum']}")


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"there is no input {shown(name)}.{hint} Inputs: {', '.join(known)}"


def _type_name(shape: dict[str, Any]) -> str:
    if shape["type"] == "array":
        return f"list of {_type_name(shape['items'])}"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    if shape.get("format") == "uri":
        return "@file or URL"
    return names.get(shape["type"], str(shape["type"]))


def _default_text(shape: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = shape.get("default")
    if default is None:
        return "may be empty"
    if isinstance(default, bool):
        return f"default {str(default).lower()}"
    return f"default {default!r}" if default == "" else f"default {textwrap.shorten(str(default), 60)}"
