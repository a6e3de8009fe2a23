"""Writes training/train.py from the settings in training/groups.py:

    python -m training.signature

Cog reads the inputs of a training statically, so they are spelled out there, one on a line.
"""

import ast
import itertools
from pathlib import Path

from training import groups
from training.config import Setting, all_settings

TARGET = Path(__file__).with_name("train.py")
LAST = ("nccl_timeout",)
"""Settings whose place in the form is after those of the other groups."""
HEADER = '''\
"""The trainer's Cog entry, whose inputs Cog reads statically.

Written by `python -m training.signature` from training/groups.py; edit that instead.
"""

# fmt: off
from typing import Optional

from cog import BaseModel, Input, Path, Secret

from lib.predictors import input_files
from training.cog_trainer import CogTrainer

input_files.install()  # Cog fetches inputs before train() is called, and trainers have no setup()

TRAINER = CogTrainer()


class TrainingOutput(BaseModel):
    weights: Path


def train(
'''
FOOTER = """\
) -> TrainingOutput:
    return TrainingOutput(weights=TRAINER.train(**locals()))  # pyright: ignore[reportCallIssue]
"""


def train_source() -> str:
    """Return the content of train.py."""
    descriptions = field_docstrings()
    settings = sorted((each for _, each in all_settings()), key=lambda each: each.name in LAST)
    return HEADER + "".join(_parameter(each, descriptions[each.name]) for each in settings) + FOOTER


def field_docstrings() -> dict[str, str]:
    """Return the docstring under each field of the config groups, on one line."""
    found = {}
    for group in ast.parse(Path(groups.__file__).read_text(encoding="utf-8")).body:
        for node, after in itertools.pairwise(getattr(group, "body", [])):
            match node, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def _parameter(each: Setting, description: str) -> str:
    kind, default = each.type.__name__, each.default
    if each.role in ("file", "secret"):
        kind = {"file": "Path", "secret": "Secret"}[each.role]
        kind = f"Optional[list[{kind}]]" if each.type is tuple else f"Optional[{kind}]"
        default = None
    elif each.optional:
        kind = f"Optional[{kind}]"
    options = [f"description={_quoted(description)}"]
    options += [f"{side}={bound!r}" for side in ("ge", "le") if (bound := getattr(each, side)) is not None]
    if each.type is str and each.role in ("value", "path") and not each.choices:
        options.append(f"max_length={each.max_length:_}")
    if each.choices:
        options.append(f"choices=[{', '.join(map(_quoted, each.choices))}]")
    options.append(f"default={_quoted(default) if isinstance(default, str) else repr(default)}")
    return f"    {each.name}: {kind} = Input({', '.join(options)}),\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


if __name__ == "__main__":
    TARGET.write_text(train_source(), encoding="utf-8")
