"""Read a predictor's signature from its source, as Cog's build does, and refuse what Cog would lose.

Nothing is imported or run, so this takes milliseconds. Cog silently drops or garbles most things that are not
spelled out literally: here they are errors that name the line and what to write instead.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCALARS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
FROM_COG = {"Path": "string", "File": "string", "Secret": "string"}
OPTIONS = ("description", "ge", "le", "min_length", "max_length", "regex", "choices", "deprecated")
MISSING = object()


class SignatureError(ValueError):
    """A signature that Cog's static reader would lose or refuse; one line per problem."""


@dataclass(kw_only=True, slots=True)
class InputField:
    """One input: its element type's name (`int`, `Path`, ...), whether it may be empty, and its options."""

    name: str
    order: int
    type: str
    optional: bool = False
    repeated: bool = False
    default: Any = MISSING
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def required(self) -> bool:
        return self.default is MISSING and not self.optional


@dataclass(kw_only=True, slots=True)
class Output:
    """What is returned: one value, a list, or an object with named fields (a `BaseModel` here)."""

    type: str | None = None
    repeated: bool = False
    iterator: bool = False
    fields: dict[str, tuple[str, bool]] | None = None


@dataclass(kw_only=True, slots=True)
class Signature:
    """`inputs` in the order of the form, and `output`."""

    inputs: list[InputField]
    output: Output


def read_signature(path: Path, name: str) -> Signature:
    """Return the signature of class `name` (its `run`) or of function `name` in the Python file at `path`.

    Raises SignatureError with every problem found.
    """
    reader = _Reader(path)
    signature = reader.read(name)
    if reader.problems or signature is None:
        raise SignatureError("\n".join(reader.problems))
    return signature


class _Reader:
    """One file's syntax tree, and the problems found while reading it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.source, str(path))
        self.lines = self.source.encode().splitlines(keepends=True)
        self.problems: list[str] = []
        self.classes = {n.name: n for n in self.tree.body if isinstance(n, ast.ClassDef)}
        self.origins = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def problem(self, node: ast.AST, text: str) -> None:
        self.problems.append(f"{self.path.name}:{getattr(node, 'lineno', 1)}: {text}")

    def read(self, name: str) -> Signature | None:
        found = [n for n in self.tree.body if getattr(n, "name", None) == name]
        if not found:
            self.problem(self.tree, f"{name} is not defined in this file; Cog does not follow imports")
            return None
        function = found[-1]
        method = isinstance(function, ast.ClassDef)
        if isinstance(function, ast.ClassDef):
            runs = [n for n in function.body if getattr(n, "name", None) in ("run", "predict")]
            if not runs:
                self.problem(function, f"{name} inherits run(); Cog reads only this file: define run() here")
                return None
            function = runs[-1]
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            self.problem(function, f"{name} is neither a class nor a function")
            return None
        return Signature(inputs=self.inputs(function, method), output=self.output(function))

    def inputs(self, function: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> list[InputField]:
        arguments = function.args
        if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
            self.problem(function, "*args, **kwargs, keyword-only and positional-only inputs are not read")
        defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
        pairs = list(zip(arguments.args, defaults, strict=True))[1 if method else 0 :]
        return [self.input(order, argument, default) for order, (argument, default) in enumerate(pairs)]

    def input(self, order: int, argument: ast.arg, default: ast.expr | None) -> InputField:
        name = argument.arg
        if argument.annotation is None:
            self.problem(argument, f"{name}: an input needs a type")
            return InputField(name=name, order=order, type="str")
        result = InputField(name=name, order=order, **self.annotation(name, argument.annotation))
        if isinstance(default, ast.Call) and getattr(default.func, "id", None) == "Input":
            self.options(result, default)
        elif default is not None:
            result.default = self.literal(f"{name}: default", default)
        if result.default is None and not result.optional:
            wanted = f"Optional[{result.type}]"
            self.problem(argument, f"{name}: default=None makes it required; write {wanted}")
        if isinstance(result.default, list | dict | set):
            self.problem(argument, f"{name}: the default must be immutable")
        self.consistency(argument, result)
        return result

    def options(self, result: InputField, call: ast.Call) -> None:
        if len(call.args) > 1:
            self.problem(call, f"{result.name}: Input takes one positional argument, the default")
        for position in call.args[:1]:
            result.default = self.literal(f"{result.name}: default", position)
        for keyword in call.keywords:
            label = f"{result.name}: {keyword.arg}"
            if keyword.arg != "default" and keyword.arg not in OPTIONS:
                self.problem(call, f"{label}: Input has no such option")
                continue
            self.plain_text(label, keyword)
            value = self.literal(label, keyword.value)
            if keyword.arg == "default":
                result.default = value
            elif value is not None and value is not MISSING:
                result.options[keyword.arg] = value

    def literal(self, label: str, node: ast.expr) -> Any:
        """Return the value of a literal, else MISSING. Cog drops names, calls and f-strings."""
        if isinstance(node, ast.JoinedStr):
            self.problem(node, f"{label}: an f-string is lost; write the text out")
            return MISSING
        try:
            return ast.literal_eval(node)
        except ValueError:
            shown = ast.unparse(node)
            self.problem(
                node, f"{label}: {shown} is not a literal; Cog drops it or fails: write the value out"
            )
            return MISSING

    def plain_text(self, label: str, keyword: ast.keyword) -> None:
        """Check that a string is one token right after `=`: Cog garbles parentheses and joined parts."""
        value = keyword.value
        if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
            return
        before = self.between(keyword, value)
        text = ast.get_source_segment(self.source, value) or ""
        tokens = tokenize.generate_tokens(io.StringIO(f"({text}\n)").readline)
        strings = [token for token in tokens if token.type == tokenize.STRING]
        if "(" in before or len(strings) != 1 or value.lineno != value.end_lineno:
            self.problem(value, f"{label}: one string on one line, without parentheses or joined parts")

    def between(self, outer: ast.keyword, inner: ast.expr) -> str:
        """Return the source from the start of `outer` to the start of `inner` (columns count UTF-8 bytes)."""
        chunk = self.lines[outer.lineno - 1 : inner.lineno]
        chunk[-1] = chunk[-1][: inner.col_offset]
        chunk[0] = chunk[0][outer.col_offset :]
        return b"".join(chunk).decode()

    def annotation(self, name: str, node: ast.expr) -> dict[str, Any]:
        """Return type, optional and repeated of `int`, `Optional[int]` or `Optional[list[int]]`."""
        optional = False
        if isinstance(node, ast.BinOp):
            self.problem(node, f"{name}: write Optional[...] instead of {ast.unparse(node)}")
            return {"type": "str", "optional": True}
        if isinstance(node, ast.Subscript) and _wrapper(node) == "Optional":
            optional, node = True, node.slice
        if _wrapper(node) == "Literal":
            self.problem(node, f"{name}: Literal is a build error; use choices=[...]")
            return {"type": "str"}
        repeated = isinstance(node, ast.Subscript) and _wrapper(node) in ("list", "List")
        element = node.slice if isinstance(node, ast.Subscript) and repeated else node
        return {"type": self.element(name, element), "optional": optional, "repeated": repeated}

    def element(self, name: str, node: ast.expr) -> str:
        known = node.id if isinstance(node, ast.Name) else ""
        if known in FROM_COG and self.origins.get(known) != ("cog", known):
            self.problem(node, f"{name}: {known} must be imported from cog")
        elif known not in SCALARS and known not in FROM_COG:
            self.problem(node, f"{name}: type {ast.unparse(node)} is not one that Cog reads")
            return "str"
        return known

    def consistency(self, node: ast.arg, result: InputField) -> None:
        """Check what Cog checks at start-up: defaults are within bounds and choices."""
        options, default = result.options, result.default
        low, high, choices = options.get("ge"), options.get("le"), options.get("choices")
        if choices is not None and (not isinstance(choices, list) or len(choices) < 2):
            self.problem(node, f"{result.name}: choices must be a literal list of at least two values")
            return
        if choices is not None and (low is not None or high is not None):
            self.problem(node, f"{result.name}: choices and ge/le exclude each other")
        if (low is not None or high is not None) and result.type not in ("int", "float"):
            self.problem(node, f"{result.name}: ge and le need a number")
            return
        if default is MISSING or default is None:
            return
        if choices is not None and default not in choices:
            self.problem(node, f"{result.name}: default {default!r} is not one of {choices}")
        if (low is not None and default < low) or (high is not None and default > high):
            self.problem(node, f"{result.name}: default {default} is out of bounds")

    def output(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Output:
        node = function.returns
        if node is None:
            self.problem(function, f"{function.name}() needs a return type")
            return Output(type="str")
        if isinstance(node, ast.Name) and node.id in self.classes:
            return Output(fields=self.model(self.classes[node.id]))
        wrapper = _wrapper(node) or ""
        if isinstance(node, ast.Subscript) and wrapper in ("list", "List", "Iterator", "AsyncIterator"):
            return Output(
                type=self.element("output", node.slice),
                repeated=True,
                iterator=re.search("Iterator$", wrapper) is not None,
            )
        return Output(type=self.element("output", node))

    def model(self, node: ast.ClassDef) -> dict[str, tuple[str, bool]]:
        """Return (type, whether it may be empty) by field of a `BaseModel` in this file."""
        fields = {}
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                read = self.annotation(item.target.id, item.annotation)
                fields[item.target.id] = (read["type"], read.get("optional", False))
        return fields


def _wrapper(node: ast.expr) -> str | None:
    """Return `Optional` for `Optional[int]` or `typing.Optional[int]`, None for anything else."""
    if not isinstance(node, ast.Subscript):
        return None
    return node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", None)
