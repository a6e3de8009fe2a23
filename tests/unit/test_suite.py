"""The suite itself does not depend on the user's environment, nor on what started it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from lib.serving.registry import PROJECT
from tests.conftest import SHARED_SERVERS

# A pytest plugin: by the time tests are collected, what they and the servers they start would inherit.
PLUGIN = """
import json, os, signal
from pathlib import Path
def pytest_collection_finish():
    ends = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = {"environment": dict(os.environ), "Ctrl-C ends": ends}
    Path(os.environ["SUITE_SEEN"]).write_text(json.dumps(seen))
"""
EXPORTED = {
    "COGVIDEOX_MODEL": "cogvideox-5b",
    "COGVIDEOX_LOCAL_SOURCES": "1",
    "HF_ENDPOINT": "http://127.0.0.1:1",
    "TRANSFORMERS_OFFLINE": "0",
    "CUDA_VISIBLE_DEVICES": "0",
}


def seen_by_the_suite(folder: Path, exported: dict[str, str], **options) -> dict:
    (folder / "show_environment.py").write_text(PLUGIN)
    seen = folder / "seen.json"
    paths = {"PYTHONPATH": f"{folder}{os.pathsep}{PROJECT}", "SUITE_SEEN": str(seen)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "show_environment"]
    command += ["-p", "no:cacheprovider", "tests/unit/serving/test_cog_yaml.py"]
    environment = os.environ | exported | paths
    subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, check=True, **options)
    return json.loads(seen.read_text())


def test_what_the_user_has_exported_does_not_reach_the_tests(tmp_path):
    inherited = seen_by_the_suite(tmp_path, EXPORTED)["environment"]
    assert inherited["CUDA_VISIBLE_DEVICES"] == ""
    assert [name for name in inherited if name.startswith(("COGVIDEOX_", "HF_", "TRANSFORMERS_"))] == []


def test_ctrl_c_works_in_the_tests_although_the_suite_runs_in_the_background(tmp_path):
    def in_the_background() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    assert seen_by_the_suite(tmp_path, {}, preexec_fn=in_the_background)["Ctrl-C ends"]


def test_files_that_share_servers_exist():
    assert [file for file in sorted(SHARED_SERVERS) if not (PROJECT / file).is_file()] == []
