"""Compare two OpenAPI documents of a predictor: what callers of the old one can no longer do."""

from typing import Any

from lib.serving.inputs import input_properties

LOWER_BOUNDS, UPPER_BOUNDS = ("minimum", "minLength"), ("maximum", "maxLength")


def incompatibilities(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a sentence for each input or output of `old` that `new` restricts; none if it is compatible."""
    problems = []
    for component in ("Input", "TrainingInput"):
        if component not in old["components"]["schemas"]:
            continue
        if component not in new["components"]["schemas"]:
            problems.append(f"{component} is gone")
            continue
        problems += _inputs(component, old, new)
    for component in ("Output", "TrainingOutput"):
        before, after = (_shape(document["components"]["schemas"].get(component)) for document in (old, new))
        if before is not None and before != after:
            problems.append(f"{component} was {before} and is {after}")
    return problems


def _inputs(component: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = input_properties(old, component), input_properties(new, component)
    was_required, is_required = (
        set(document["components"]["schemas"][component].get("required", [])) for document in (old, new)
    )
    problems = [f"{component} {name} is required" for name in sorted(is_required - was_required)]
    for name, was in before.items():
        if name not in after:
            problems.append(f"{component} {name} is gone")
        else:
            problems += [f"{component} {name}: {problem}" for problem in _input(was, after[name])]
    return problems


def _input(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if _shape(was) != _shape(now):
        return [f"the type was {_shape(was)} and is {_shape(now)}"]
    problems = []
    if was.get("nullable") and not now.get("nullable"):
        problems.append("it can no longer be null")
    for bound in (*LOWER_BOUNDS, *UPPER_BOUNDS):
        if bound not in now:
            continue
        raised = bound not in was or now[bound] > was[bound]
        lowered = bound not in was or now[bound] < was[bound]
        if raised if bound in LOWER_BOUNDS else lowered:
            problems.append(f"{bound} was {was.get(bound, 'not set')} and is {now[bound]}")
    if now.get("pattern") not in (None, was.get("pattern")):
        problems.append(f"the pattern is {now['pattern']}")
    if "enum" in now:
        if "enum" not in was:
            problems.append(f"only {', '.join(map(str, now['enum']))} are allowed")
        problems += [f"the choice {each} is gone" for each in was.get("enum", []) if each not in now["enum"]]
    return problems


def _shape(schema: dict[str, Any] | None) -> Any:
    """Return type and format of a value, of a list's items and of an object's fields."""
    if schema is None:
        return None
    shape = {key: schema[key] for key in ("type", "format", "x-cog-array-type") if key in schema}
    if "items" in schema:
        shape["items"] = _shape(schema["items"])
    if "properties" in schema:
        required = schema.get("required", [])
        shape["fields"] = {
            name: _shape(field) | ({} if name in required else {"optional": True})
            for name, field in schema["properties"].items()
        }
    return shape
