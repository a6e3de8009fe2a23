"""script/convert and script/export-lora as users run them: results, refusals, Ctrl-C, kills, reruns."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib.models.layout import missing_files
from lib.serving.registry import PROJECT
from lib.storage.lock import lock
from tests.convert_factory import (
    VAE_FILE,
    expected,
    options,
    same_states,
    sat_transformer,
    save_sat,
    source,
    stored,
)
from tests.http_host import Host, Served

NAME = "i2v-5b"
SEVERAL = """
import contextlib, io, json, sys
from lib.commands.convert import main

for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""
OVERRIDES = "overrides=" + ",".join(f"{name}={value}" for name, value in options(NAME).items())
LARGE = ["large.pt", "overrides=sample_frames=9", "dtype=float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The commands' working directory: oracles, a LoRA, and a transformer of 0.3 GB."""
    folder = tmp_path_factory.mktemp("command")
    for path in (source(NAME), source("lora-t2v-2b"), VAE_FILE):
        (folder / path.name).symlink_to(path)
    large = sat_transformer(heads=16, head_dim=64, layers=6)
    save_sat(folder / "large.pt", large)
    return folder


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(PROJECT), "COGVIDEOX_CACHE": str(folder / "cache")}


def started(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "lib.commands.convert", *arguments],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def several(folder: Path, *commands: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Status, standard output and standard error of commands, run in one process to import torch once."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SEVERAL],
        input=json.dumps(commands),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    return [(status, out.strip(), err) for status, out, err in outcomes]


def wait_until_writing(folder: Path, process: subprocess.Popen) -> None:
    """Wait until a tenth of the weights is written."""
    deadline, size = time.monotonic() + 60, (folder / "large.pt").stat().st_size
    while not any(path.stat().st_size > size / 10 for path in folder.glob("*.partial/*/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_results_appear_next_to_their_files_and_convert_back(folder):
    lora = "lora-t2v-2b-diffusers/lora.safetensors"
    way_back = [f"{NAME}-diffusers", "direction=to_sat", "output=sat", "overrides=norm_num_groups=2"]
    with Host({"/deep/fetched.pt": Served(source(NAME).read_bytes())}) as host:
        outcomes = several(
            folder,
            ("model", f"{NAME}.pt", "vae=vae.pt", "dtype=float32", OVERRIDES),
            ("model", *way_back),
            ("model", host.url("/deep/fetched.pt"), OVERRIDES, "dtype=float32"),
            ("lora", "lora-t2v-2b.pt", "alpha=4"),
            ("lora", lora, "direction=to_sat", "output=lora-sat"),
            ("model", f"{NAME}.pt", OVERRIDES),
        )
    assert [status for status, *_ in outcomes] == [0, 0, 0, 0, 0, 1], outcomes
    assert [out.removeprefix(f"{folder}/") for _, out, _ in outcomes] == [
        f"{NAME}-diffusers", "sat", "fetched-diffusers", lora, "lora-sat/1/mp_rank_00_model_states.pt", "",
    ]  # fmt: skip
    assert f"{NAME}-diffusers already exists and is not overwritten." in outcomes[-1][2]
    for place in (f"{NAME}-diffusers", "fetched-diffusers"):
        assert same_states(stored(folder / place / "transformer"), expected(NAME))
    assert same_states(stored(folder / f"{NAME}-diffusers" / "vae"), expected("vae"))
    assert sorted(path.name for path in (folder / "sat").iterdir()) == [
        "1", "3d-vae.pt", "README.md", "latest", "report.json",
    ]  # fmt: skip
    assert len(load_file(folder / lora)) == 16
    assert (
        len(torch.load(folder / "lora-sat/1/mp_rank_00_model_states.pt", weights_only=True)["module"]) == 16
    )
    assert list((folder / "cache" / "checkpoints").iterdir()) == []


def test_help_wrong_command_lines_and_refusals(folder):
    before = sorted(path.name for path in folder.iterdir())
    refused = {
        ("a.pt", "dtyp=float16"): (2, "there is no input 'dtyp'. Did you mean dtype?"),
        ("a.pt", "b.pt"): (2, "'b.pt' is not setting=value; usage: script/convert FILE"),
        ("a.pt", "dtype=int8"): (2, "dtype: 'int8' is not one of auto, float16"),
        ("output=y",): (2, "no file, folder or address is given; usage: script/convert FILE"),
        ("a.pt", "overrides=layers=3"): (2, "layers=3 cannot be overridden; allowed are sample_height"),
        ("transformer_url=https://example.com/a.pt",): (2, "no input 'transformer_url'. Did you mean transf"),
        ("vae=vae.pt", "text_encoder=true"): (2, "text_encoder=true needs a transformer"),
        ("none.pt",): (1, "There is no file or folder none.pt."),
        ("vae.pt", f"vae={NAME}.pt"): (1, "The two files are swapped: vae.pt, given as the transformer, is"),
        ("vae=vae.pt",): (1, "family is needed for a VAE alone"),
        ("lora-t2v-2b.pt", "direction=to_sat", "output=x"): (1, "lora-t2v-2b.pt is a SAT LoRA"),
        (f"{NAME}.pt", "output=none/../busy"): (1, f"Another process is converting into {folder}/busy; wait"),
    }
    with lock(folder / "busy", print):
        helped, none, lora, alpha, *outcomes = several(
            folder,
            ("model", "--help"),
            ("model",),
            ("lora", "-h"),
            ("lora", "a.pt", "alpha=0"),
            *(("model", *each) for each in refused),
        )
    assert helped[0] == 0 and "usage: script/convert FILE" in helped[1] and "\n  overrides  (" in helped[1]
    assert none == (2, helped[1], "")
    for text in (helped[1], lora[1]):
        assert not any(message in text for message in ("_url", "2 GiB", "@file", "upload it"))
        assert "by its path or https:// address" in " ".join(text.split())
    assert lora[0] == 0 and "\n  alpha  (" in lora[1]
    assert alpha == (
        2,
        "",
        "alpha=0.0 is not supported; it has to be a number above 0. SAT's default is 1.\n",
    )
    for (status, message), outcome in zip(refused.values(), outcomes, strict=True):
        assert (outcome[0], outcome[1], message in outcome[2]) == (status, "", True), outcome
    assert sorted(path.name for path in folder.iterdir() if path.name != "cache") == [
        name for name in before if name != "cache"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_conversion_leaves_no_folder_that_loads_and_can_be_started_again(folder, number):
    target = folder / f"stopped-{number.name}"
    command = ("model", *LARGE, f"output={target.name}")
    with started(folder, *command) as process:
        wait_until_writing(folder, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    left = [path for path in folder.iterdir() if path.name.startswith(target.name)]
    assert not target.exists()
    if number == signal.SIGINT:
        assert process.returncode == 130 and left == []
        assert "stopped; the same command starts it again" in err and "Traceback" not in err
    assert not any(path.is_dir() and not missing_files(path) for path in left)
    with started(folder, *command) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, f"{target}\n"), err
    [count] = set(re.findall(r"converting transformer \((\d+)\)", err))
    assert f"converting transformer {count}/{count}, " in err
    assert [path.name for path in folder.iterdir() if path.name.startswith(target.name)] == [target.name]
