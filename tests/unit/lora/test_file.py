"""Files that are not valid safetensors are refused before loading, with what they are instead."""

import io
import json
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save, save_file

from lib.errors import UserError
from lib.lora.file import MAX_TENSORS, kind_of, read_header


def with_header(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list[int], first: int, last: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [first, last]}


def old_tar() -> bytes:
    """Return a tar in the format before POSIX, whose header has no magic number."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("lora.safetensors"))
    block = bytearray(buffer.getvalue()[:512])
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(1024)


def test_a_header_is_read_as_safetensors_wrote_it(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.tensor(1.0)}
    save_file(tensors, path, metadata={"note": "x"})
    assert kind_of(path, name="it") == "safetensors"
    header = read_header(path, name="it")
    assert {key: (t.dtype, t.shape) for key, t in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "c": ("F32", ()),
    }
    assert header.metadata == {"note": "x"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_are_recognized_by_content(tmp_path, mode):
    with tarfile.open(tmp_path / "a", mode) as tar:
        tar.add(__file__, "x")
    assert kind_of(tmp_path / "a", name="it") == "tar"


def test_an_old_tar_is_recognized(tmp_path):
    (tmp_path / "a").write_bytes(old_tar())
    assert kind_of(tmp_path / "a", name="it") == "tar"


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    assert zipfile.is_zipfile(io.BytesIO(buffer.getvalue()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": 1}), "a pickle, and loading one could run any code"),
        (zip_bytes(), "a PyTorch pickle"),
        (b"<!doctype html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"", "empty or cut off: it has 0 bytes"),
        (b"\0" * 400, "neither a safetensors file nor a tar archive"),
        (b"PNG and so on, no weights", "neither a safetensors file nor a tar archive"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=r"it is .*Give a \.safetensors file") as caught:
        kind_of(tmp_path / "a", name="it")
    assert message in str(caught.value)


SOUND = save({"a": torch.zeros(8, 8), "b": torch.zeros(8)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SOUND[:-1], "file not fully covered"),
        (SOUND[:40], "invalid header length"),
        (SOUND + b"\0", "file not fully covered"),
        (struct.pack("<Q", 10**8 + 1) + b"{}", "header too large"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header too large"),
        (struct.pack("<Q", 3) + b"{x}", "invalid JSON in header"),
        (struct.pack("<Q", 20_000) + b"[" * 20_000, "invalid JSON in header"),
        (with_header([]), "invalid JSON in header"),
        (with_header({"a": 1}), "invalid JSON in header"),
        (with_header({"a": entry([-1], 0, 4)}, bytes(4)), "invalid JSON in header"),
        (with_header({"a": entry([2], 0, 4)}, bytes(4)), "invalid shape, data type, or offset for tensor"),
        (with_header({"a": entry([1], 4, 8)}, bytes(8)), "invalid offset for tensor `a`"),
        (with_header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "invalid offset for tensor"),
    ],
)
def test_a_header_that_is_damaged_or_contradicts_the_file_is_refused(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="it is not a complete safetensors file") as caught:
        read_header(tmp_path / "a", name="it")
    assert message in str(caught.value)


def test_a_web_page_with_a_safetensors_name_is_named_as_one(tmp_path):
    (tmp_path / "a").write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(UserError, match=r"^it is a web page, not the file itself; copy the address"):
        read_header(tmp_path / "a", name="it")


def test_a_header_with_far_more_tensors_than_a_lora_has_is_refused(tmp_path):
    header = {f"{index}": entry([0], 0, 0) for index in range(MAX_TENSORS + 1)}
    (tmp_path / "a").write_bytes(with_header(header))
    with pytest.raises(UserError, match="it has 50,001 tensors; at most 50,000 are read"):
        read_header(tmp_path / "a", name="it")
