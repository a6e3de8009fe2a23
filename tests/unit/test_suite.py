"""The suite itself does not depend on the user's environment."""

import json
import os
import subprocess
import sys

from lib.serving.configs import PROJECT

# A pytest plugin: by the time tests are collected, what they and the servers they start would inherit.
PLUGIN = """
import json, os
from pathlib import Path
def pytest_collection_finish():
    Path(os.environ["SUITE_SEEN"]).write_text(json.dumps(dict(os.environ)))
"""
EXPORTED = {
    "COGVIDEOX_MODEL": "cogvideox-5b",
    "COGVIDEOX_LOCAL_SOURCES": "1",
    "HF_ENDPOINT": "http://127.0.0.1:1",
    "TRANSFORMERS_OFFLINE": "0",
    "CUDA_VISIBLE_DEVICES": "0",
}


def test_what_the_user_has_exported_does_not_reach_the_tests(tmp_path):
    (tmp_path / "show_environment.py").write_text(PLUGIN)
    seen = tmp_path / "seen.json"
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}", "SUITE_SEEN": str(seen)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "show_environment"]
    command += ["-p", "no:cacheprovider", "tests/unit/test_cog_yaml.py"]
    subprocess.run(command, cwd=PROJECT, env=os.environ | EXPORTED | paths, capture_output=True, check=True)
    inherited = json.loads(seen.read_text())
    assert inherited["CUDA_VISIBLE_DEVICES"] == ""
    assert [name for name in inherited if name.startswith(("COGVIDEOX_", "HF_", "TRANSFORMERS_"))] == []
