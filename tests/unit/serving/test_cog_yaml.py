"""The cog*.yaml files hold only what Cog knows, agree with each other, and fit the project."""

import os
import re
from typing import Any

import pytest
import yaml

from lib.serving.registry import PROJECT

FILES = sorted(PROJECT.glob("cog*.yaml"))


def is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_environment(value: Any) -> bool:
    return is_text_list(value) and all(re.match(r"[A-Za-z_]\w*=", item) for item in value)


def is_concurrency(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"max"} and type(value["max"]) is int


def is_commands(value: Any) -> bool:
    """Strings, or mappings with a command."""
    return isinstance(value, list) and all(
        isinstance(item, str)
        or (isinstance(item, dict) and {"command"} <= set(item) <= {"command", "mounts"})
        for item in value
    )


KEYS = {
    "build": lambda value: isinstance(value, dict),
    "image": is_text,
    "model": is_text,
    "run": is_text,
    "predict": is_text,
    "train": is_text,
    "concurrency": is_concurrency,
    "environment": is_environment,
    "weights": lambda value: isinstance(value, list),
}
BUILD_KEYS = {
    "cuda": is_text,
    "cudnn": is_text,
    "gpu": lambda value: isinstance(value, bool),
    # A number would turn 3.10 into 3.1.
    "python_version": is_text,
    "python_packages": is_text_list,
    "pre_install": is_text_list,
    "python_requirements": is_text,
    "system_packages": is_text_list,
    "sdk_version": is_text,
    "run": is_commands,
}


def config_problems(document: Any) -> list[str]:
    """Return what Cog does not know in one cog.yaml."""
    if not isinstance(document, dict):
        return ["not a mapping"]
    build = document.get("build", {})
    found = [f"unknown key {key}" for key in document if key not in KEYS]
    found += [f"wrong type for {key}" for key in document if key in KEYS and not KEYS[key](document[key])]
    if isinstance(build, dict):
        found += [f"unknown key build.{key}" for key in build if key not in BUILD_KEYS]
        known = [key for key in build if key in BUILD_KEYS]
        found += [f"wrong type for build.{key}" for key in known if not BUILD_KEYS[key](build[key])]
    if "run" in document and "predict" in document:
        found.append("run and predict exclude each other")
    found += [
        f"{key} is not file.py:name"
        for key in ("run", "predict", "train")
        if is_text(document.get(key)) and not re.fullmatch(r"[\w/]+\.py:\w+", document[key])
    ]
    return found


def differing_builds(documents: dict[str, Any]) -> list[str]:
    """Return the names of files whose build: block differs from the first."""
    first = next(iter(documents.values())).get("build")
    return [name for name, document in documents.items() if document.get("build") != first]


def load_all() -> dict[str, Any]:
    return {file.name: yaml.safe_load(file.read_text()) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_cog_knows_every_key_and_type(file):
    assert config_problems(yaml.safe_load(file.read_text())) == []


def test_all_build_blocks_are_the_same():
    assert len(FILES) >= 2
    assert differing_builds(load_all()) == []


BAD = {
    "build: {gpus: true}": "unknown key build.gpus",
    "build: {gpu: 'yes'}": "wrong type for build.gpu",
    "build: {python_version: 3.11}": "wrong type for build.python_version",
    "build: {cuda: 13.0}": "wrong type for build.cuda",
    "build: {python_packages: torch==2.13.0}": "wrong type for build.python_packages",
    "build: {run: [{mounts: []}]}": "wrong type for build.run",
    "build: [gpu]": "wrong type for build",
    "predictor: p.py:P": "unknown key predictor",
    "environment: {A: b}": "wrong type for environment",
    "environment: [A]": "wrong type for environment",
    "concurrency: 2": "wrong type for concurrency",
    "run: predict.py": "run is not file.py:name",
    "{run: 'p.py:R', predict: 'p.py:R'}": "run and predict exclude each other",
    "[run]": "not a mapping",
}


@pytest.mark.parametrize("text", BAD)
def test_a_key_or_type_that_cog_does_not_know_is_found(text):
    assert config_problems(yaml.safe_load(text)) == [BAD[text]]


def test_differing_build_blocks_are_found():
    same = {"cog.yaml": {"build": {"gpu": True}}, "cog.b.yaml": {"build": {"gpu": True}}}
    assert differing_builds(same) == []
    assert differing_builds(same | {"cog.c.yaml": {"build": {"gpu": True, "cuda": "13.0"}}}) == ["cog.c.yaml"]
    assert differing_builds(same | {"cog.d.yaml": {}}) == ["cog.d.yaml"]


@pytest.mark.parametrize("name", load_all())
def test_the_image_gets_what_the_project_pins(name):
    build = load_all()[name]["build"]
    requirements = (PROJECT / build["python_requirements"]).read_text().splitlines()
    assert not [line for line in requirements if line.startswith("cog==")], "sdk_version names it"
    local = (PROJECT / "requirements-local.txt").read_text().splitlines()
    assert f"cog=={build['sdk_version']}" in local
    assert build["gpu"] is True
    (pget,) = (command for command in build["run"] if "pget" in command)
    assert "/download/v" in pget and pget.index("sha256sum -c") < pget.index("install ")
    # Cog copies only this one file into the build.
    assert not [line for line in requirements if line.startswith("-")]
    assert all("==" in line for line in requirements if line and not line.startswith("#"))


def test_every_process_gets_the_same_openmp_settings():
    setting = "GOMP_SPINCOUNT=1000"
    for name, document in load_all().items():
        assert setting in document["environment"], name
    assert 'export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"' in (PROJECT / "script" / "_env.sh").read_text()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"  # tests/conftest.py
    for script in (PROJECT / "script").iterdir():
        starts_python = not script.name.startswith("_") and script.name != "setup"
        assert not starts_python or "_env.sh" in script.read_text(), script.name
