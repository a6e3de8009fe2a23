"""Results appear complete or not at all, describe themselves, and take little memory."""

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from lib.cancellation import Stopped
from lib.convert import writing
from lib.convert.formats import write_safetensors, write_torch
from lib.convert.models import to_diffusers, to_sat
from lib.convert.writing import PlannedTensor, Progress, new_folder
from lib.models.layout import missing_files
from lib.storage.disk import NoSpaceError
from tests import convert_factory as factory
from tests.convert_factory import silent

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "weights" / "tiny-t2v"


def plan(state: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> list[PlannedTensor]:
    return [
        PlannedTensor(name=name, pieces=[tensor], shape=tuple(tensor.shape), dtype=dtype or tensor.dtype)
        for name, tensor in state.items()
    ]


def progress(state: dict[str, torch.Tensor], lines: list[str] | None = None) -> Progress:
    return Progress("it", plan(state), silent if lines is None else lines.append)


def convert(target: Path, name: str = "t2v-2b", **options):
    given = {"transformer": factory.source(name), "vae": factory.VAE_FILE, "report": silent}
    return to_diffusers(target=target, options=factory.options(name), **given | options)


STATE = {
    "a": torch.arange(12.0).reshape(3, 4),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
    "scalar": torch.tensor(3.5),
    "half": torch.arange(5, dtype=torch.bfloat16),
}


def test_safetensors_and_torch_read_the_written_files(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_ELEMENTS", 5)
    write_safetensors(tmp_path, "m", plan(STATE), progress(STATE))
    write_torch(tmp_path / "m.pt", "module", plan(STATE), progress(STATE))
    mapped = torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)["module"]
    for found in (load_file(tmp_path / "m.safetensors"), mapped, torch.load(tmp_path / "m.pt")["module"]):
        assert found.keys() == STATE.keys()
        for key, tensor in STATE.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


def test_shards_have_the_given_size_and_the_index_finds_every_tensor(tmp_path):
    state = {f"t{place}": torch.full((10,), float(place)) for place in range(7)}
    written = write_safetensors(tmp_path, "m", plan(state), progress(state), shard_bytes=100)
    assert list(written) == [f"m-0000{place}-of-00004.safetensors" for place in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 280}
    for key, name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / name)[key], state[key])


def test_checksums_and_sizes_are_those_of_the_files(tmp_path):
    written = write_safetensors(tmp_path, "m", plan(STATE), progress(STATE), shard_bytes=30)
    written["m.pt"] = write_torch(tmp_path / "m.pt", "module", plan(STATE), progress(STATE))
    for name, file in written.items():
        content = (tmp_path / name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_nan_and_infinity_are_counted_while_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_ELEMENTS", 5)
    odd = torch.arange(12.0)
    odd[[2, 3, 11]] = torch.tensor([torch.nan, -torch.inf, torch.inf])
    state = {**STATE, "odd": odd, "none": torch.zeros(0), "more": odd.to(torch.bfloat16)}
    written = write_safetensors(tmp_path, "m", plan(state), progress(state), shard_bytes=100)
    counted = [file.not_finite for file in written.values() if file.not_finite]
    assert counted == [{"odd": 3}, {"more": 3}] or counted == [{"odd": 3, "more": 3}]
    assert write_torch(tmp_path / "m.pt", "module", plan(state), progress(state)).not_finite == {
        "odd": 3, "more": 3,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_nan_and_infinity_are_noted_in_log_and_report(tmp_path, dtype):
    state = factory.sat_transformer()
    state["time_embed.0.bias"][:3] = torch.tensor([torch.nan, 1.0, torch.inf])
    path, lines = factory.save_sat(tmp_path / "broken.pt", state), []
    result = to_diffusers(transformer=path, target=tmp_path / "out", dtype=dtype, report=lines.append)
    note = (
        "broken.pt contains NaN or infinity, and so does the result: 2 values in "
        "time_embedding.linear_1.bias. Its output will be unusable."
    )
    assert result.notes == [note] and note in lines
    assert note in (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["notes"] == [note]
    assert [file["not_finite"] for file in report["parts"][0]["files"].values()] == [
        {"time_embedding.linear_1.bias": 2}
    ]
    back = to_sat(transformer=tmp_path / "out" / "transformer", target=tmp_path / "sat", report=silent)
    assert "2 values in model.diffusion_model.time_embed.0.bias." in back.notes[0]


def test_progress_counts_written_tensors(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(writing, "REPORT_SECONDS", 0)
    it = progress({"a": torch.zeros(250_000), "b": torch.zeros(500_000)}, lines)
    for count in (500_000, 500_000, 2_000_000):
        it.add(count)
    assert lines == [
        "progress: converting it 0/2, 500.0 kB",
        "progress: converting it 1/2, 1.0 MB",
        "progress: converting it 2/2, 3.0 MB",
    ]


def test_results_are_readable_by_everyone(tmp_path):
    previous = os.umask(0o077)
    try:
        convert(tmp_path / "out")
        to_sat(transformer=tmp_path / "out", target=tmp_path / "sat", report=silent)
    finally:
        os.umask(previous)
    files = [path for root in ("out", "sat") for path in (tmp_path / root).rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_a_failure_leaves_nothing_and_leftovers_are_removed_by_the_next_start(tmp_path):
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(ZeroDivisionError), new_folder(target) as folder:
        (folder / "file").write_text("half")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    partial.mkdir()
    (partial / "of a killed process").write_text("half")
    with new_folder(target) as folder:
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == [target]


def test_a_stopped_conversion_leaves_nothing(tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        convert(tmp_path / "out", stop=stop)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from lib.convert import writing
from lib.convert.models import to_diffusers
from tests import convert_factory as factory
count = 0
def add(self, size):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
writing.Progress.add = add
to_diffusers(transformer=factory.source("t2v-2b"), vae=factory.VAE_FILE, target=Path(sys.argv[1]),
             options=factory.options("t2v-2b"))
"""


@pytest.mark.parametrize("block", [10, 300])  # in the transformer, in the VAE
def test_a_killed_conversion_leaves_no_folder_that_seems_complete(tmp_path, block):
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    done = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, str(target), str(block)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    assert missing_files(partial) == ["model_index.json"]
    unfinished = partial / ("transformer" if block == 10 else "vae")
    assert any(unfinished.iterdir()) and not (unfinished / "config.json").exists()
    convert(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_too_little_space_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(NoSpaceError, match=r"MB are needed and 1\.0 kB are free"):
        convert(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


FULL = """
import sys
from pathlib import Path
from lib.storage.disk import NoSpaceError
from lib.convert import models
from lib.convert.models import to_diffusers, to_sat
from tests import convert_factory as factory
disk, model = Path(sys.argv[1]), Path(sys.argv[2])
def attempt(function, **given):
    try:
        function(target=disk / "out", report=lambda line: None, **given)
    except NoSpaceError as error:
        print(error)
given = {"transformer": factory.source("t2v-2b"), "vae": factory.VAE_FILE}
given["options"] = factory.options("t2v-2b")
attempt(to_diffusers, **given)
models.require_room = lambda folder, planned: None
attempt(to_diffusers, **given)
attempt(to_sat, transformer=model)
print(sorted(path.name for path in disk.iterdir()))
"""


def test_a_full_disk_is_an_error_and_left_empty(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    convert(tmp_path / "model", dtype="float32")
    mount = f"mount -t tmpfs -o size=200k tmpfs {disk}"
    path = os.defpath + ":/sbin:/usr/sbin"
    unshare = shutil.which("unshare", path=path)
    if not unshare or subprocess.run([unshare, "-Urm", "sh", "-c", mount], env={"PATH": path}).returncode:
        pytest.skip("a small disk cannot be mounted on this machine")
    run = f'{mount} && exec "$0" -P -c "$1" "$2" "$3"'
    done = subprocess.run(
        [unshare, "-Urm", "sh", "-c", run, sys.executable, FULL, str(disk), str(tmp_path / "model")],
        env={"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *messages, left = done.stdout.splitlines()
    assert len(messages) == 3
    assert messages[0].startswith(f"Not enough room in {disk}/out.partial: ")
    full = f"The disk is full: {disk}/out could not be written. Free some space, then start again."
    assert messages[1:] == [full, full]
    assert left == "[]"


MEMORY = """
import sys
from pathlib import Path
from lib.convert import writing
from lib.convert.models import to_diffusers, to_sat
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
root, peaks, first = Path(sys.argv[1]), [0], []
def add(self, size):
    first.append(anonymous())
    peaks[-1] = max(peaks[-1], first[-1])
writing.Progress.add = add
to_diffusers(transformer=root / "model.pt", target=root / "model", report=lambda line: None)
print(peaks[0] - first[0])
peaks, first = [0], []
to_sat(transformer=root / "model", target=root / "sat", report=lambda line: None)
print(peaks[0] - first[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_memory_use_is_a_few_tensors(tmp_path):
    state = factory.sat_transformer(heads=16, head_dim=64, layers=3)
    size = sum(tensor.nbytes for tensor in factory.save_sat(tmp_path / "model.pt", state) and state.values())
    assert size > 150e6
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEMORY, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    there, back = (1024 * int(line) for line in done.stdout.split())
    assert there < 60e6 and back < 60e6, (there, back)


def test_the_call_in_the_readme_loads_the_folder(tmp_path):
    result = convert(tmp_path / "out")
    assert result.missing == ["text_encoder", "tokenizer"]
    readme = (tmp_path / "out" / "README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    assert '"zai-org/CogVideoX-2b", subfolder="text_encoder", torch_dtype=torch.float16' in code
    text = T5EncoderModel(T5Config(d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50))
    call = code[code.index("pipe =") :].replace('"."', repr(str(tmp_path / "out")))
    names = {"CogVideoXPipeline": CogVideoXPipeline, "torch": torch, "text_encoder": text, "tokenizer": None}
    exec(call, names)
    assert names["pipe"].transformer.config.num_layers == 2 and names["pipe"].text_encoder is text


def test_an_included_text_encoder_completes_the_folder(tmp_path):
    result = convert(tmp_path / "out", text_encoder=TINY)
    assert (result.included, result.missing) == (["text_encoder", "tokenizer"], [])
    assert missing_files(tmp_path / "out") == []
    for part in ("text_encoder", "tokenizer"):
        for file in (TINY / part).iterdir():
            assert (tmp_path / "out" / part / file.name).read_bytes() == file.read_bytes()


def test_the_report_says_what_was_found_dropped_written_and_checked(tmp_path):
    lines: list[str] = []
    convert(tmp_path / "out", "t2v-5b", report=lines.append)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    transformer, vae = report["parts"]
    assert report["variant"] == "a CogVideoX of 2 layers and width 32, of the cogvideox-5b family"
    assert (transformer["tensors"], transformer["dtype"], vae["tensors"]) == (64, "bfloat16", 436)
    assert transformer["checked"] == "all 64 names and shapes match diffusers 0.42.1"
    assert set(transformer["dropped"]) == {
        "conditioner.*", "mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos",
        "transformer.position_embeddings.weight",
    }  # fmt: skip
    for part in report["parts"]:
        for name, file in part["files"].items():
            content = (tmp_path / "out" / name).read_bytes()
            checksum = hashlib.sha256(content).hexdigest()
            assert file == {"bytes": len(content), "sha256": checksum, "not_finite": {}}
    assert report["settings"] == {
        "family": "cogvideox-5b", "scaling_factor": 0.7, "invert_scale_latents": False, "snr_shift_scale": 1.0
    }  # fmt: skip
    assert lines[-1] == f"Done: {tmp_path / 'out'}"
