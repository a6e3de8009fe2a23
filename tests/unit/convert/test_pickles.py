"""Pickles are read without computing anything, within limits, and tensors as torch.load reads them."""

import contextlib
import io
import itertools
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.convert import pickle_worker
from lib.convert.reading import open_checkpoint
from lib.errors import UserError

HOSTILE = Path(__file__).parents[2] / "data" / "hostile"
NAMES = [
    *((module, name) for module, names in pickle_worker.DROPPED.items() for name in sorted(names)),
    *(("torch._utils", name) for name in sorted(pickle_worker.PLAIN_TENSORS | pickle_worker.OTHER_TENSORS)),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.nn.parameter", "Parameter"),
    ("collections", "OrderedDict"),
    ("torch", "FloatStorage"),
    ("torch.storage", "UntypedStorage"),
    ("torch", "float32"),
]
ARGUMENTS = {
    "nothing": b")",
    "a size": b"J\xff\xff\xff\x7f\x85",
    "a list of itself": b"]\x94h\x00a\x85",
    "text": b"X\x03\x00\x00\x00|O8\x85",
    "tuples": b"K\x01" + b"\x85" * 2000,
    "many": b"(" + b"K\x01" * 300 + b"t",
}

ENDINGS = (pickle.UnpicklingError, AttributeError, TypeError, KeyError)
"""What unpickling raises where an instruction does not suit what it is for."""


def write(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {key: tensor.clone() for key, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("object-array-into-counter.pt", "is not a checkpoint: it holds no tensors."),
        ("bytearray-of-any-size.pt", "is not a checkpoint: it holds no tensors."),
        ("nested-tuple-as-key.pt", "is damaged or cut off: reading it took too much processor time"),
    ],
)
def test_hostile_files_are_refused_or_read_without_computing(name, reason):
    started = time.monotonic()
    with pytest.raises(UserError) as caught, open_checkpoint(HOSTILE / name):
        pass
    assert str(caught.value) == f"{name} {reason}"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_what_is_allowed_by_name_computes_nothing(module, name):
    called = f"c{module}\n{name}\n".encode()
    for arguments, build in itertools.product(ARGUMENTS.values(), (b"", b"N}b", b"N}X\1\0\0\0aK\1s\x86b")):
        # The name called, built, appended to, and its result called again.
        pickled = b"\x80\x02" + called + arguments + b"R" + build + b"."
        with contextlib.suppress(*ENDINGS):
            content = pickle_worker.Reader(io.BytesIO(pickled)).load()
            assert isinstance(content, pickle_worker.Inert | pickle_worker.Pairs)


def test_sizes_in_the_pickle_are_not_allocated(tmp_path):
    for module, name in (("builtins", "bytearray"), ("numpy", "ndarray"), ("torch", "Size")):
        call = f"c{module}\n{name}\n".encode() + b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R"
        path = write(tmp_path / f"{name}.pt", b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s.")
        with pytest.raises(UserError, match="it holds no tensors"):
            tensors(path)


def test_tensors_are_those_of_torch_load(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "transposed": base.T,
        "part": base[1:3, 2:5],
        "scalar": torch.tensor(3.5),
        "bf16": torch.randn(5, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "half": torch.ones(3).half(),
        "long": torch.arange(3),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(base[0]),
        "complex": torch.ones(2, dtype=torch.int16),
    }
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        kept = {key: value for key, value in content.items() if not (options and key == "fp8")}
        torch.save(kept, tmp_path / "file.pt", **options)
        expected = torch.load(tmp_path / "file.pt", weights_only=True)
        read = tensors(tmp_path / "file.pt")
        assert read.keys() == expected.keys()
        for key, tensor in expected.items():
            assert read[key].dtype == tensor.dtype
            assert read[key].shape == tensor.shape
            assert torch.equal(read[key].float(), tensor.detach().float())


def test_a_tensor_outside_its_values_is_refused(tmp_path):
    torch.save({"a": torch.ones(4)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        members = {name: good.read(name) for name in good.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    assert members[pickled].count(b"K\x04\x85") == 1
    for wrong in (b"K\x05\x85", b"J\xff\xff\xff\x7f\x85", b"J\xff\xff\xff\xff\x85"):
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
            for name, content in members.items():
                bad.writestr(name, content.replace(b"K\x04\x85", wrong) if name == pickled else content)
        with pytest.raises(UserError, match=r"bad\.pt is damaged or cut off: a tensor"):
            tensors(tmp_path / "bad.pt")


def test_deep_nesting_is_refused(tmp_path):
    nested = b"}X\x01\x00\x00\x00a" * 5000 + b"K\x01" + b"s" * 5000
    path = write(tmp_path / "deep.pt", b"\x80\x02" + nested + b".")
    with pytest.raises(UserError, match=r"deep\.pt is not a checkpoint"):
        tensors(path)


def test_a_few_bytes_that_stand_for_a_large_table_are_refused(tmp_path):
    pickled = b"\x80\x02}q\x00"
    for level in range(1, 9):  # each mapping holds the one before 26 times
        keys = [b"X\x01\x00\x00\x00" + bytes([65 + key]) + b"h" + bytes([level - 1]) for key in range(26)]
        pickled += b"}q" + bytes([level]) + b"(" + b"".join(keys) + b"u"
    with pytest.raises(UserError, match=r"many\.pt is damaged or cut off: reading it took too much"):
        tensors(write(tmp_path / "many.pt", pickled + b"."))


def test_random_state_of_numpy_is_passed_over(tmp_path):
    state = {"module": {"a": torch.ones(2)}, "np_rng_state": np.random.default_rng(0).integers(9, size=3)}
    torch.save(state, tmp_path / "file.pt")
    assert tensors(tmp_path / "file.pt")["a"].tolist() == [1, 1]
