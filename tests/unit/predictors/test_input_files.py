import errno
import io
import tempfile
from pathlib import Path

import cog.types
import pytest

from lib.errors import UserError
from lib.network import urls
from lib.predictors import input_files
from tests.http_host import Host, Served


@pytest.fixture
def made(monkeypatch, tmp_path) -> Path:
    """The empty folder where temporary files are made, under the guard and with local addresses allowed."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(cog.types.URLFile, "__wrapped__", cog.types.URLFile.__wrapped__)
    monkeypatch.setattr(cog.types.URLPath, "convert", cog.types.URLPath.convert)
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    input_files.install()
    return folder


def given(url: str) -> cog.types.URLPath:
    path = cog.types.Path.validate(url)
    assert isinstance(path, cog.types.URLPath)
    return path


def fails_and_leaves_nothing(made: Path, url: str, match: str) -> None:
    path = given(url)
    with pytest.raises(UserError, match=match):
        path.convert()
    assert list(made.iterdir()) == []
    path.unlink(missing_ok=True)  # as Cog does after every request


def test_an_input_becomes_a_file_that_is_accepted_once_and_removed_by_cog(made, monkeypatch):
    body = bytes(range(256)) * 10_000
    with Host({"/picture.png": Served(body)}) as host:
        path = given(host.url("/picture.png"))
        file = path.convert()
        assert path.convert() == file, "it is fetched once"
        assert len(host.requests) == 1
    assert [file] == list(made.iterdir())
    assert file.read_bytes() == body and file.name.endswith("picture.png")
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    assert input_files.check_file(file) == file
    with pytest.raises(UserError, match="is a path on the server"):
        input_files.check_file(file)
    path.unlink()
    assert list(made.iterdir()) == []


def test_a_data_uri_becomes_a_file_too(made):
    file = given("data:image/png;base64,aGVsbG8=").convert()
    assert file.read_bytes() == b"hello" and file.suffix == ".png"


def test_a_refused_address_leaves_no_file(made, monkeypatch):
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    fails_and_leaves_nothing(made, "https://127.0.0.1:1/a.png", "private address")


def test_an_address_without_a_file_leaves_no_file(made):
    with Host({}) as host:
        fails_and_leaves_nothing(made, host.url("/a.png"), "nothing at this address")


@pytest.mark.parametrize("length", [True, False])
def test_an_input_that_is_too_large_leaves_no_file(made, monkeypatch, length):
    monkeypatch.setattr(input_files, "MAX_INPUT_BYTES", 100_000)
    with Host({"/a.png": Served(bytes(100_001), length=length)}) as host:
        fails_and_leaves_nothing(made, host.url("/a.png?token=x"), r"/a\.png' is larger than 100\.0 kB")
    with Host({"/a.png": Served(bytes(100_000), length=length)}) as host:
        assert given(host.url("/a.png")).convert().stat().st_size == 100_000


def test_a_connection_that_breaks_leaves_no_file(made):
    with Host({"/a.png": Served(bytes(100_000), truncate_at=60_000)}) as host:
        fails_and_leaves_nothing(made, host.url("/a.png"), "ended 40,000 bytes early")


def test_a_host_that_trickles_leaves_no_file(made, monkeypatch):
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.4)
    with Host({"/a.png": Served(bytes(1000), piece=1, pause=0.02)}) as host:
        fails_and_leaves_nothing(made, host.url("/a.png"), "too slow")


def test_a_full_disk_is_told_and_leaves_no_file(made, monkeypatch):
    class Full(io.FileIO):
        def write(self, block: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(input_files, "open", Full, raising=False)
    with Host({"/a.png": Served(bytes(1000))}) as host:
        fails_and_leaves_nothing(made, host.url("/a.png"), "The disk is full")


def test_a_request_that_is_cancelled_while_it_fetches_leaves_no_file(made, monkeypatch):
    class CancelledError(BaseException):
        pass

    def cancelled(*args: object) -> bytes:
        raise CancelledError

    monkeypatch.setattr(input_files, "_read", cancelled)
    with pytest.raises(CancelledError):
        given("data:image/png;base64,aGVsbG8=").convert()
    assert list(made.iterdir()) == []
