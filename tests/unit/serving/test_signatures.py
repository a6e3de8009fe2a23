"""Every predictor's signature survives Cog's static reader, and what would not is found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lib.serving.registry import PROJECT, predictors
from lib.serving.signature import MISSING, SignatureError, read_signature

HEAD = "from typing import List, Literal, Optional\nfrom cog import BaseModel, BaseRunner, Input, Path\n"
TRAIN = PROJECT / "training" / "train.py"


def runner(tmp_path: Path, inputs: str, *, returns: str = " -> Path", head: str = HEAD) -> Path:
    """A predictor file whose run() takes `inputs`."""
    file = tmp_path / "predict_sample.py"
    file.write_text(f"{head}class Runner(BaseRunner):\n    def run(self, {inputs}){returns}:\n        pass\n")
    return file


def problems(file: Path, name: str = "Runner") -> str:
    with pytest.raises(SignatureError) as caught:
        read_signature(file, name)
    return str(caught.value)


@pytest.mark.parametrize("file", sorted(PROJECT.glob("predict_*.py")), ids=lambda file: file.name)
def test_every_predictor_is_spelled_out_literally(file):
    signature = read_signature(file, "Runner")
    assert signature.inputs, f"{file.name} has no inputs"
    for item in signature.inputs:
        assert item.options.get("description"), f"{file.name}: {item.name} has no description"


def test_the_trainer_is_spelled_out_literally():
    assert read_signature(TRAIN, "train").inputs


def test_there_is_a_predictor_behind_every_configuration():
    assert {"t2v", "i2v"} <= set(predictors())
    for config in predictors().values():
        assert read_signature(config.predictor, config.class_name).inputs


# The rows of Cog's table of losses, each with what the reader says about it.
LOST = {
    "constant bound": ("n: int = Input(ge=1, le=MAX_STEPS)", "MAX_STEPS is not a literal"),
    "f-string description": ('n: int = Input(description=f"up to {9}")', "f-string"),
    "parenthesised description": ('n: int = Input(description=("words"))', "without parentheses"),
    "parenthesised lines": ('n: int = Input(description=(\n    "one "\n    "two"\n))', "without parentheses"),
    "joined description": ('n: int = Input(description="a " "b")', "joined parts"),
    "triple-quoted lines": ('n: int = Input(description="""a\nb""")', "one line"),
    "imported default": ("n: int = Input(default=STEPS)", "STEPS is not a literal"),
    "None for a plain int": ("seed: int = Input(default=None)", "write Optional[int]"),
    "None for a plain file": ("f: Path = Input(default=None)", "write Optional[Path]"),
    "imported choices": ("m: str = Input(choices=NAMES)", "NAMES is not a literal"),
    "computed choices": ("m: str = Input(choices=list(D))", "list(D) is not a literal"),
    "Literal": ('m: Literal["a", "b"] = Input(default="a")', "use choices"),
    "modern union": ("n: int | None = Input(default=None)", "write Optional[...]"),
    "no type": ("n = Input(default=1)", "needs a type"),
    "unknown type": ("n: complex = Input()", "not one that Cog reads"),
    "unknown option": ("n: int = Input(minimum=1)", "no such option"),
    "variable inputs": ("*values: int", "are not read"),
    "keyword-only inputs": ("*, n: int = Input(default=1)", "are not read"),
    "default out of bounds": ("n: int = Input(default=11, le=10)", "out of bounds"),
    "default outside choices": ('m: str = Input(default="c", choices=["a", "b"])', "not one of"),
    "one choice": ('m: str = Input(choices=["a"])', "at least two"),
    "bounds on text": ('m: str = Input(default="a", ge=1)', "need a number"),
}


@pytest.mark.parametrize("construct", LOST)
def test_finds_what_cog_would_lose(tmp_path, construct):
    inputs, complaint = LOST[construct]
    found = problems(runner(tmp_path, inputs))
    assert complaint in found
    assert "predict_sample.py:" in found
    assert len(found.splitlines()) == 1, "one construct is reported once"


def test_finds_an_inherited_run(tmp_path):
    file = tmp_path / "p.py"
    file.write_text("from shared import Base\nclass Runner(Base):\n    def setup(self) -> None: ...\n")
    assert "inherits run()" in problems(file)


def test_finds_a_runner_that_is_imported(tmp_path):
    file = tmp_path / "p.py"
    file.write_text("from elsewhere import Runner\n")
    assert "not defined in this file" in problems(file)


def test_finds_a_missing_return_type(tmp_path):
    assert "needs a return type" in problems(runner(tmp_path, "n: int", returns=""))


def test_finds_a_path_that_is_not_cogs(tmp_path):
    head = "from pathlib import Path\nfrom cog import BaseRunner, Input\n"
    assert "must be imported from cog" in problems(runner(tmp_path, "f: Path", head=head))


def test_reports_all_problems_at_once(tmp_path):
    found = problems(runner(tmp_path, "a: int = Input(le=X),\n  b: int = Input(default=None)"))
    assert [line.split(":")[1] for line in found.splitlines()] == ["4", "5"]


def test_reads_what_cog_reads(tmp_path):
    inputs = """a: int, b: float = Input(default=-1.5, ge=-2, le=2), c: Optional[Path] = Input(default=None),
        d: str = Input(description="über (all) \\"quoted\\"", default="", choices=["", "x"]), e: bool = True,
        f: List[Path] = Input(description="many")"""
    signature = read_signature(runner(tmp_path, inputs, returns=" -> list[Path]"), "Runner")
    a, b, c, d, e, f = signature.inputs
    assert (a.required, a.default, a.order) == (True, MISSING, 0)
    assert (b.default, b.options) == (-1.5, {"ge": -2, "le": 2})
    assert (c.type, c.optional, c.required, c.default) == ("Path", True, False, None)
    assert d.options == {"description": 'über (all) "quoted"', "choices": ["", "x"]}
    assert (e.default, e.required) == (True, False)
    assert (f.type, f.repeated, f.required) == ("Path", True, True)
    assert (signature.output.type, signature.output.repeated) == ("Path", True)


# Imports a predictor as Cog's runtime does, with lib/ replaced by a stand-in where it would load models.
INSPECT = """
import importlib.util, json, sys, types
class Anything(types.ModuleType):
    def __getattr__(self, name): return type(name, (), {})
class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.split(".")[0] == "lib" else None
    def create_module(self, spec):
        module = Anything(spec.name); module.__path__ = []; return module
    def exec_module(self, module): pass
sys.meta_path.insert(0, Finder())
from cog._inspector import create_predictor
info = create_predictor(sys.argv[1], "Runner")
shown = {}
for name, item in info.inputs.items():
    shown[name] = [item.order, item.type.python_type_name(), item.default, item.description, item.ge, item.le,
                   item.choices]
print(json.dumps({"inputs": shown, "output": info.output.json_type()}))
"""


@pytest.mark.parametrize("file", sorted(PROJECT.glob("predict_*.py")), ids=lambda file: file.name)
def test_the_static_reading_agrees_with_cogs_own_inspection(file):
    done = subprocess.run(
        [sys.executable, "-c", INSPECT, file.stem], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    inspected = json.loads(done.stdout.splitlines()[-1])
    read = {}
    for item in read_signature(file, "Runner").inputs:
        kind = f"List[{item.type}]" if item.repeated else item.type
        default = None if item.default is MISSING else item.default
        read[item.name] = [
            item.order,
            f"Optional[{kind}]" if item.optional else kind,
            default,
            item.options.get("description"),
            item.options.get("ge"),
            item.options.get("le"),
            item.options.get("choices"),
        ]
    assert read == inspected["inputs"]
    file_form = {"type": "string", "format": "uri"}
    forms = {
        "predict_caption.py": {"type": "string"},  # words, not a file
        "predict_story.py": {"type": "array", "items": file_form},
    }
    assert inspected["output"] == {"title": "Output"} | forms.get(file.name, file_form)
