"""script/caption: in place, stopped, killed, with invalid arguments, and in several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lib.datasets.clips import find_clips
from lib.serving.backend import free_port
from lib.serving.registry import PROJECT
from tests.caption_factory import write_captioner
from tests.clips_factory import write_clips, zip_of
from tests.training_commands import finished, started

COUNT = 6
COMMAND = (sys.executable, "-P", "-m", "lib.commands.caption")
SCRIPT = (str(PROJECT / "script" / "caption"),)
SETTINGS = ("max_new_tokens=12", "trigger_word=TOK")
SLOW = ("max_new_tokens=250", "batch_size=1")

# Imported at the start of every Python process: records the batches that are captioned in the file NOTES,
# kills the process before batch number FATAL, and gives the second process another model.
HOOK = """
import os, signal, sys

if "NOTES" in os.environ and (os.environ.get("RANK") or "lib.commands.caption" in " ".join(sys.orig_argv)):
    import importlib.abc, importlib.util

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "lib.caption.captioner":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), watch(module))
            return spec

    def watch(module):
        original = module.Captioner.caption
        calls = []

        def caption(self, clips, *arguments, **options):
            if str(len(calls)) == os.environ.get("FATAL"):
                os.kill(os.getpid(), signal.SIGKILL)
            answer = original(self, clips, *arguments, **options)
            calls.append(len(clips))
            with open(os.environ["NOTES"], "a") as notes:
                notes.write(f"{len(clips)}\\n")
            return answer

        module.Captioner.caption = caption

    sys.meta_path.insert(0, Finder())
if os.environ.get("RANK") == "1" and "MODEL_OF_PROCESS_1" in os.environ:
    os.environ["COGVIDEOX_MODEL"] = os.environ["MODEL_OF_PROCESS_1"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    write_captioner(folder / "nonsense", ends=False)
    for text in write_clips(folder / "clips", COUNT).glob("*.txt"):
        text.unlink()
    zip_of(folder / "clips", folder / "clips.zip")
    (folder / "sitecustomize.py").write_text(HOOK)
    return folder


@pytest.fixture(scope="module")
def environment(folder) -> dict[str, str]:
    return os.environ | {
        "COGVIDEOX_MODEL": str(folder / "nonsense"),
        "COGVIDEOX_CACHE": str(folder / "cache"),
        "PYTHONPATH": f"{folder}{os.pathsep}{PROJECT}",
        "SETUP_FLAGS": "",
    }


def two_processes(*more: str) -> tuple[str, ...]:
    """Return `accelerate launch --multi_gpu --num_processes 2 -m lib.commands.caption`, on a free port."""
    return (
        sys.executable, "-P", "-m", "accelerate.commands.launch", *(more or ("--multi_gpu",)),
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(free_port()), "-m", "lib.commands.caption",
    )  # fmt: skip


def captions(folder: Path) -> dict[str, str]:
    clips, left_out = find_clips(folder)
    assert left_out == []
    return {clip.name: clip.caption for clip in clips}


def recorded(folder: Path) -> list[str]:
    return [
        json.loads(line)["file_name"]
        for path in sorted(folder.glob("captions*.jsonl"))
        for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def reference(folder, environment) -> dict[str, str]:
    """Caption the clips in place with one process."""
    shutil.copytree(folder / "clips", folder / "whole")
    status, out, err = finished(folder, environment, "whole", *SETTINGS, launch=SCRIPT)
    assert (status, out) == (0, f"{folder / 'whole'}\n"), err
    assert f"captioning {COUNT}/{COUNT}, 0:00 left" in err
    assert f"{COUNT} clips: {COUNT} captioned, {COUNT} cut off at max_new_tokens" in err
    return captions(folder / "whole")


def test_a_folder_is_captioned_in_place(folder, reference):
    assert len(set(reference.values())) == COUNT
    assert all(text.startswith("TOK ") for text in reference.values())
    for name, text in reference.items():
        assert (folder / "whole" / name).with_suffix(".txt").read_text() == f"{text}\n"


@pytest.mark.slow
def test_a_killed_run_is_resumed_without_captioning_a_clip_twice(folder, environment, reference):
    notes = {"NOTES": str(folder / "calls")}
    command = ("clips.zip", "output_dir=killed", *SETTINGS, "batch_size=2")
    status, _, _ = finished(folder, environment | notes | {"FATAL": "2"}, *command, launch=COMMAND)
    assert status == -signal.SIGKILL
    assert len(recorded(folder / "killed")) == 4
    status, _, err = finished(folder, environment | notes, *command, launch=COMMAND)
    assert (status, f"4 of {COUNT} clips are done already" in err) == (0, True), err
    assert (folder / "calls").read_text().split() == ["2", "2", "2"]
    assert sorted(recorded(folder / "killed")) == sorted(reference)
    assert captions(folder / "killed") == reference


@pytest.mark.slow
def test_ctrl_c_stops_within_a_clip_and_the_same_command_resumes(folder, environment):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(folder, environment, "clips", "output_dir=stopped", *SLOW, launch=COMMAND, **streams) as run:
        deadline = time.monotonic() + 120
        while not (folder / "stopped" / "captions.jsonl").is_file():
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=120)
    assert (run.returncode, out) == (130, "")
    assert err.endswith("stopped; the same command resumes it\n") and "Traceback" not in err
    done = recorded(folder / "stopped")
    assert 1 <= len(done) < COUNT
    assert [path.name for path in (folder / "stopped").iterdir()] == ["captions.jsonl"]
    status, _, err = finished(folder, environment, "clips", "output_dir=stopped", *SLOW, launch=COMMAND)
    assert (status, f"{len(done)} of {COUNT} clips are done already" in err) == (0, True), err
    assert len(captions(folder / "stopped")) == COUNT


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "usage: script/caption FOLDER_OR_ARCHIVE [output_dir=PATH] [setting=value ...]"),
        (["trigger_word=TOK"], 2, "a folder or archive is missing; usage: script/caption FOLDER_OR_ARCHIVE"),
        (["clips", "more"], 2, "'more' is not setting=value; usage: "),
        (["clips", "triger_word=TOK"], 2, "there is no input 'triger_word'. Did you mean trigger_word?"),
        (["clips", "batch_size=65"], 2, "batch_size: 65 is greater than the maximum of 64"),
        (["none"], 1, "none does not exist. Give a folder, or a zip or tar of clips."),
        (
            ["clips.zip"],
            1,
            "clips.zip is not a folder. An archive needs output_dir=PATH, where its captions go;",
        ),
        (["https://example.org/clips.zip"], 1, "is an address; give a folder, zip or tar on this machine."),
        (["nonsense"], 1, "nonsense holds no clips: it has 3 .json, 1 .safetensors."),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(folder, environment, arguments, status, message):
    found, out, err = finished(folder, environment, *arguments, launch=COMMAND)
    assert (found, message in out + err, "Traceback" in err) == (status, True, False), err


def test_two_processes_give_the_captions_of_one_and_caption_each_clip_once(folder, environment, reference):
    shutil.copytree(folder / "clips", folder / "both")
    notes = {"NOTES": str(folder / "calls of both")}
    status, out, err = finished(
        folder, environment | notes, "both", *SETTINGS, "batch_size=1", launch=two_processes()
    )
    assert (status, out) == (0, f"{folder / 'both'}\n"), err
    assert captions(folder / "both") == reference
    assert (folder / "calls of both").read_text().split() == ["1"] * COUNT
    assert sorted(recorded(folder / "both")) == sorted(reference)
    names = {path.name for path in (folder / "both").iterdir()}
    assert names == {path.name for path in (folder / "whole").iterdir()}


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_reports_why(folder, environment):
    status, out, err = finished(
        folder, environment | {"MODEL_OF_PROCESS_1": "tiny-t2v"}, "clips", "output_dir=odd", *SLOW,
        launch=two_processes(),
    )  # fmt: skip
    assert (status, out) == (1, "")
    [reported] = [line for line in err.splitlines() if line.startswith("process 1: ")]
    assert "tiny-t2v is a model for text-to-video" in reported


@pytest.mark.slow
def test_an_error_of_the_first_process_is_reported_once(folder, environment):
    status, out, err = finished(folder, environment, "nonsense", launch=two_processes())
    assert (status, out) == (1, "")
    assert err.count("nonsense holds no clips") == 1
    assert "process 1:" not in err


@pytest.mark.slow
def test_after_a_killed_process_the_work_of_both_is_not_repeated(folder, environment, reference):
    with started(
        folder, environment, "clips", "output_dir=half", *SLOW, launch=two_processes(),
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    ) as launcher:  # fmt: skip
        deadline = time.monotonic() + 120
        while len(list((folder / "half").glob("captions*.jsonl"))) < 2:
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        parent = psutil.Process(launcher.pid)
        children = parent.children(
            recursive=True
        )  # including the decoding processes, with the same environment
        [doomed] = [child for child in parent.children() if child.environ().get("RANK") == "1"]
        doomed.kill()
        assert launcher.wait(120) == 1
        assert not psutil.wait_procs(children, timeout=30)[1]
    done = recorded(folder / "half")
    assert len(set(done)) == len(done) < COUNT
    notes = {"NOTES": str(folder / "calls of the second half")}
    status, _, err = finished(folder, environment | notes, "clips", "output_dir=half", *SLOW, launch=COMMAND)
    assert (status, f"{len(done)} of {COUNT} clips are done already" in err) == (0, True), err
    assert (folder / "calls of the second half").read_text().split() == ["1"] * (COUNT - len(done))
    assert [path.name for path in (folder / "half").glob("captions*")] == ["captions.jsonl"]
    assert len(captions(folder / "half")) == COUNT


def test_a_launch_of_one_process_instead_of_several_is_refused(folder, environment):
    status, _, err = finished(folder, environment, "clips", launch=two_processes("--cpu"))
    assert status == 1
    assert "accelerate launch was asked for several processes and started one" in err
