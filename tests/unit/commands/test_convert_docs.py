"""What docs/convert.md says holds: settings, defaults and commands are those of the predictors."""

import re
import shlex

import pytest

from lib.commands.convert import COMMANDS, LOCALLY, _split, settings_of
from lib.convert.configs import OPTIONS
from lib.serving.inputs import input_properties, parse_inputs
from lib.serving.registry import PROJECT
from lib.serving.schema import input_document

PAGES = {name: (PROJECT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/convert.md")}
PAGE = PAGES["docs/convert.md"]
DOCUMENTS = {name: input_document(PROJECT / each.predictor, name="Runner") for name, each in COMMANDS.items()}
SCRIPTS = {each.script: name for name, each in COMMANDS.items()}


def commands() -> list[str]:
    lines = [line for page in PAGES.values() for line in page.splitlines()]
    return [line for line in lines if line.startswith(tuple(f"{script} " for script in SCRIPTS))]


@pytest.mark.parametrize("line", commands())
def test_every_command_on_the_page_is_valid(line):
    script, *words = shlex.split(line)
    kind = SCRIPTS[script]
    pairs, _ = _split(words, COMMANDS[kind])
    assert parse_inputs(pairs, settings_of(COMMANDS[kind]), send_files=False)


def test_texts_that_the_commands_replace_occur_in_the_forms():
    descriptions = [
        shape["description"] for each in DOCUMENTS.values() for shape in input_properties(each).values()
    ]
    for text in LOCALLY:
        assert any(text in description for description in descriptions), text


def test_there_are_commands_for_both_directions_of_models_and_loras():
    assert {line.split()[0] for line in commands() if "to_sat" in line} == set(SCRIPTS)
    assert {line.split()[0] for line in commands() if "to_sat" not in line} == set(SCRIPTS)


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_setting_and_choice_is_on_the_page(kind):
    for name, shape in input_properties(DOCUMENTS[kind]).items():
        assert f"`{name}`" in PAGE, name
        for choice in shape.get("enum", []):
            assert f"`{choice}`" in PAGE, f"{name}={choice}"


def test_every_override_is_on_the_page_and_in_the_form():
    description = input_properties(DOCUMENTS["model"])["overrides"]["description"]
    for name in OPTIONS:
        assert f"`{name}`" in PAGE and re.search(rf"\b{name}\b", description), name
