"""Checkpoints are complete or absent, checked when read, and refused by runs they do not fit."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lib.errors import UserError
from lib.storage.disk import NoSpaceError
from tests.training_factory import config
from training import checkpoints
from training.checkpoints import LORA, STATE, TENSORS, State

ROOT = Path(__file__).resolve().parents[3]


def state(step: int = 3, **changes) -> State:
    standard = {
        "step": step, "seed": 7, "base": "tiny-i2v", "fits": config(rank=4).fixed(), "data": "d",
        "global_batch": 2,
    }  # fmt: skip
    return State(**{"losses": [1e-17, 0.1 + 0.2, 0.5][:step]} | standard | changes)


def tensors() -> dict:
    """What a real optimizer and schedule leave, with the random state."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    schedule.step()
    return {
        "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "scaler": {},
        "random": torch.get_rng_state(),
    }  # fmt: skip


def write(run: Path, step: int = 3, *, lora: bytes = b"matrices", **changes) -> Path:
    target = checkpoints.checkpoint_folder(run, step)
    return checkpoints.save(target, state(step, **changes), tensors(), lambda path: path.write_bytes(lora))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing


def test_a_saved_checkpoint_is_read_back(tmp_path):
    folder = write(tmp_path, 3)
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    assert names(folder) == sorted([LORA, STATE, TENSORS]) and names(folder.parent) == [folder.name]
    assert checkpoints.read_state(folder) == state(3)  # losses to the last bit
    assert (folder / LORA).read_bytes() == b"matrices"
    found, expected = checkpoints.read_tensors(folder), tensors()
    assert torch.equal(found["random"], expected["random"])
    assert torch.equal(
        found["optimizer"]["state"][0]["exp_avg"], expected["optimizer"]["state"][0]["exp_avg"]
    )
    assert found["schedule"] == expected["schedule"]


def fail(place: str):
    def failing(*arguments, **options):
        raise {"disk": OSError(errno.ENOSPC, "No space left"), "torch": RuntimeError("unexpected pos 7")}[
            place
        ]

    return failing


@pytest.mark.parametrize(
    ("broken", "place", "message"),
    [
        ("lora", "disk", "The disk is full"),
        ("torch.save", "disk", "The disk is full"),
        ("torch.save", "torch", r"could not be written: unexpected pos 7\. Is the disk full\?"),
        ("pathlib.Path.write_text", "disk", "The disk is full"),
        ("os.fsync", "disk", "The disk is full"),
        ("os.replace", "disk", "The disk is full"),
    ],
)
def test_a_failed_write_leaves_only_the_earlier_checkpoint(tmp_path, monkeypatch, broken, place, message):
    write(tmp_path, 2)
    if broken != "lora":
        monkeypatch.setattr(broken, fail(place))
    with pytest.raises(UserError, match=message):
        checkpoints.save(
            checkpoints.checkpoint_folder(tmp_path, 3), state(), tensors(),
            fail(place) if broken == "lora" else lambda path: path.write_bytes(b"x"),
        )  # fmt: skip
    monkeypatch.undo()
    assert names(tmp_path / "checkpoints") == ["step-00000002"]
    assert checkpoints.latest(tmp_path) == checkpoints.checkpoint_folder(tmp_path, 2)


def test_a_programming_error_is_not_reported_as_a_full_disk_and_leaves_nothing(tmp_path):
    def broken(path):
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        checkpoints.save(checkpoints.checkpoint_folder(tmp_path, 3), state(), tensors(), broken)
    assert names(tmp_path / "checkpoints") == []


def test_saving_the_same_step_again_keeps_the_complete_checkpoint(tmp_path):
    folder = write(tmp_path, 3, lora=b"first")
    before = (folder / LORA).stat()
    assert write(tmp_path, 3, lora=b"again") == folder
    assert (folder / LORA).stat() == before and (folder / LORA).read_bytes() == b"first"
    assert names(tmp_path / "checkpoints") == ["step-00000003"]


def test_a_partial_checkpoint_of_a_killed_run_is_ignored_and_replaced(tmp_path):
    write(tmp_path, 2)
    half = tmp_path / "checkpoints" / "step-00000003.partial"
    half.mkdir()
    (half / STATE).write_text("{")
    (half / "old").write_bytes(b"x")
    assert checkpoints.latest(tmp_path).name == "step-00000002"
    folder = write(tmp_path, 3)
    assert names(folder) == sorted([LORA, STATE, TENSORS])
    assert names(tmp_path / "checkpoints") == ["step-00000002", "step-00000003"]


KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from training import checkpoints
run, when = Path(sys.argv[1]), sys.argv[2]
original, calls = getattr(os, when), []
def killing(*arguments, **options):
    calls.append(arguments)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
setattr(os, when, killing)
checkpoints.keep_newest(run, 1)
"""


@pytest.mark.parametrize(("when", "call"), [("replace", 1), ("unlink", 1), ("unlink", 2), ("rmdir", 1)])
def test_a_kill_while_removing_leaves_no_half_checkpoint_under_its_name(tmp_path, when, call):
    for step in (1, 2):
        write(tmp_path, step)
    ran = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, str(tmp_path), when, str(call)],
        env=dict(os.environ) | {"PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL
    left = checkpoints.all_checkpoints(tmp_path)
    assert [path.name for path in left] == ["step-00000001", "step-00000002"][0 if when == "replace" else 1 :]
    for folder in left:
        checkpoints.read_state(folder)
        checkpoints.read_tensors(folder)
    checkpoints.keep_newest(tmp_path, 1)
    assert checkpoints.all_checkpoints(tmp_path) == [checkpoints.checkpoint_folder(tmp_path, 2)]


FULL = """
import sys
from pathlib import Path
import torch
from lib.storage.disk import NoSpaceError
from lib.errors import UserError
from tests.unit.training.test_checkpoints import state
from training import checkpoints
run = Path(sys.argv[1])
small, large = {"x": torch.zeros(1000)}, {"x": torch.zeros(400_000)}
checkpoints.save(checkpoints.checkpoint_folder(run, 1), state(1), small, lambda path: path.write_bytes(b"x"))
def lora(path):
    path.write_bytes(bytes(1_500_000))
for write, tensors in ((lora, small), (lambda path: path.write_bytes(b"x"), large)):
    try:
        checkpoints.save(checkpoints.checkpoint_folder(run, 2), state(2), tensors, write)
    except UserError as error:
        print(str(error).replace(str(run), "RUN"))
print(sorted(path.name for path in (run / "checkpoints").iterdir()))
"""


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    path = os.defpath + ":/sbin:/usr/sbin"
    unshare = shutil.which("unshare", path=path)
    if not unshare or subprocess.run([unshare, "-Urm", "sh", "-c", mount], env={"PATH": path}).returncode:
        pytest.skip("this machine does not allow mounting a small disk")
    run = f'{mount} && exec "$0" -P -c "$1" "$2"'
    done = subprocess.run(
        [unshare, "-Urm", "sh", "-c", run, sys.executable, FULL, str(disk)],
        env={"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    *messages, left = done.stdout.splitlines()
    assert len(messages) == 2, done.stderr
    assert messages[0].startswith("The disk is full: RUN/checkpoints/step-00000002")
    assert "RUN/checkpoints/step-00000002 could not be written" in messages[1]
    assert "disk full" in messages[1] or "disk is full" in messages[1]
    assert left == "['step-00000001']"


# Finding and removing


def test_the_newest_are_kept_and_the_newest_is_the_latest(tmp_path):
    assert checkpoints.all_checkpoints(tmp_path) == [] and checkpoints.latest(tmp_path) is None
    for step in (1000, 9, 100_000_000, 500):
        write(tmp_path, step)
    steps = [int(path.name.partition("-")[2]) for path in checkpoints.all_checkpoints(tmp_path)]
    assert steps == [9, 500, 1000, 100_000_000]
    checkpoints.keep_newest(tmp_path, 2)
    assert names(tmp_path / "checkpoints") == ["step-00001000", "step-100000000"]
    assert checkpoints.latest(tmp_path).name == "step-100000000"
    checkpoints.keep_newest(tmp_path, 5)
    assert len(checkpoints.all_checkpoints(tmp_path)) == 2


def test_only_a_folder_with_a_state_is_a_checkpoint(tmp_path):
    assert checkpoints.is_checkpoint(write(tmp_path, 1))
    (tmp_path / LORA).write_bytes(b"x")
    assert not checkpoints.is_checkpoint(tmp_path)


# What is refused


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "7", '{"step": 3}', '{"stepp": 3}', "\x00", b"\xff\xfe"]
)
def test_a_damaged_state_is_refused(tmp_path, content):
    folder = write(tmp_path, 3)
    (folder / STATE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="step-00000003 is not a checkpoint of this trainer: "):
        checkpoints.read_state(folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"step": "3"}, {"step": -1}, {"step": 2.5}, {"losses": "many"}, {"losses": [0.1]}, {"seed": None},
        {"losses": [0.1, "x", 0.2]}, {"losses": [0.1, float("nan"), 0.2]}, {"fits": []}, {"step": True},
    ],
)  # fmt: skip
def test_a_state_with_impossible_values_is_refused(tmp_path, changed):
    """resume_from may be a tar of an untrusted caller: its errors must be found before training."""
    folder = write(tmp_path, 3)
    (folder / STATE).write_text(json.dumps(asdict(state(3)) | changed))
    with pytest.raises(UserError, match="step-00000003 is not a checkpoint of this trainer: "):
        checkpoints.read_state(folder)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "flipped", "unpicklable"])
def test_damaged_tensors_are_refused(tmp_path, damage):
    folder = write(tmp_path, 3)
    path = folder / TENSORS
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[: len(content) // 2],
                "text": b"no tensors at all",
                "flipped": bytes(64) + content[64:],
                "unpicklable": content.replace(b"optimizer", b"optim\xff\xff\xff\xff"),
            }[damage]
        )
    with pytest.raises(UserError, match=r"training\.pt of the checkpoint cannot be read: "):
        checkpoints.read_tensors(folder)


@pytest.mark.parametrize("content", [[1, 2], {"optimizer": {}}, torch.zeros(3)])
def test_tensors_of_something_else_are_refused(tmp_path, content):
    folder = write(tmp_path, 3)
    torch.save(content, folder / TENSORS)
    with pytest.raises(UserError, match=r"training\.pt of the checkpoint cannot be read: missing: "):
        checkpoints.read_tensors(folder)


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (os.mkdir, (str(self.proof),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle", "inside"])
def test_code_in_the_tensors_is_not_run(tmp_path, form):
    folder, proof = write(tmp_path, 3), tmp_path / "ran"
    path, payload = folder / TENSORS, Payload(proof)
    if form == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif form == "inside":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, pickle.dumps(payload) if name.endswith("data.pkl") else content)
    else:
        torch.save({"x": payload}, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(UserError, match=r"training\.pt of the checkpoint cannot be read: "):
        checkpoints.read_tensors(folder)
    assert not proof.exists()


# Resuming


def test_a_run_takes_the_seed_of_its_checkpoint_unless_one_is_given():
    assert checkpoints.with_seed_of(config(rank=4), state()).compute.seed == 7
    assert checkpoints.with_seed_of(config(rank=4, seed=0), state()).compute.seed == 0
    changed = config(rank=4, learning_rate=1e-3, max_train_steps=9)
    assert checkpoints.with_seed_of(changed, state()).optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8, "lora_alpha": 4}, "rank (it has 4, this run 8)"),
        ({"rank": 4, "lora_alpha": 2}, "lora_alpha (it has 4.0, this run 2.0)"),
        ({"rank": 4, "optimizer": "adamw"}, "optimizer (it has adam, this run adamw)"),
        (
            {"rank": 4, "target_modules": "to_q"},
            "target_modules (it has to_k,to_out.0,to_q,to_v, this run to_q)",
        ),
    ],
)
def test_another_lora_or_optimizer_cannot_resume(settings, message):
    with pytest.raises(UserError) as caught:
        checkpoints.with_seed_of(config(**settings), state())
    assert str(caught.value) == (
        f"the checkpoint of step 3 does not fit: {message}. Use the settings it was made with, or another "
        "output_dir to start from scratch."
    )


def test_errors_name_the_checkpoint_that_is_kept(tmp_path):
    with pytest.raises(UserError) as caught, checkpoints.name_kept_checkpoint(tmp_path):
        raise NoSpaceError("The disk is full.")
    assert str(caught.value) == "The disk is full."
    write(tmp_path, 12)
    with pytest.raises(NoSpaceError) as caught, checkpoints.name_kept_checkpoint(tmp_path):
        raise NoSpaceError("The disk is full.")
    assert str(caught.value) == (
        "The disk is full. The checkpoint of step 12 is kept; lora.safetensors in it can be used."
    )
