import errno
import gc
import os
import tempfile
from pathlib import Path

import cog.types
import pytest

from lib.errors import UserError
from lib.network import http, urls
from lib.predictors import input_files
from lib.predictors.start import start_video
from tests.http_host import Host, Served


@pytest.fixture
def made(monkeypatch, tmp_path) -> Path:
    """Return the empty folder for temporary files, with the hooks installed and local addresses allowed."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(cog.types.URLFile, "__wrapped__", cog.types.URLFile.__wrapped__)
    monkeypatch.setattr(cog.types.URLPath, "convert", cog.types.URLPath.convert)
    monkeypatch.setattr(cog.types.URLPath, "unlink", cog.types.URLPath.unlink)
    monkeypatch.setattr(cog.types.Path, "validate", vars(cog.types.Path)["validate"])
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    input_files.install()
    return folder


def input_path(url: str) -> cog.types.URLPath:
    path = cog.types.Path.validate(url)
    assert isinstance(path, cog.types.URLPath)
    return path


def fails_and_leaves_nothing(made: Path, url: str, match: str) -> None:
    path = input_path(url)
    with pytest.raises(UserError, match=match):
        path.convert()
    assert list(made.iterdir()) == []
    path.unlink(missing_ok=True)  # as Cog does after every request


def test_an_input_becomes_a_file_that_is_accepted_once_and_that_cog_removes(made, monkeypatch):
    body = bytes(range(256)) * 10_000
    with Host({"/picture.png": Served(body)}) as host:
        path = input_path(host.url("/picture.png"))
        file = path.convert()
        assert path.convert() == file, "it is fetched once"
        assert len(host.requests) == 1
    assert [file.parent] == list(made.iterdir()) and [file] == list(file.parent.iterdir())
    assert file.read_bytes() == body and file.name == "picture.png"
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    assert input_files.check_file(file) == file
    with pytest.raises(UserError, match="is a path on the server"):
        input_files.check_file(file)
    path.unlink()
    assert list(made.iterdir()) == []


def test_a_data_uri_becomes_a_file_too(made):
    file = input_path("data:image/png;base64,aGVsbG8=").convert()
    assert file.read_bytes() == b"hello" and file.suffix == ".png"


@pytest.mark.parametrize(
    ("end", "name"),
    [
        ("my%20clip%20(1).mp4", "my clip (1).mp4"),
        ("..", "file"),
        (".hidden.mp4", "hidden.mp4"),
        ("%2e%2e%2fa%00b.mp4", "_a_b.mp4"),
        ("", "file"),
    ],
)
def test_a_file_has_a_name_that_is_safe(made, end, name):
    with Host({"/x/y": Served(b"hello")}) as host:
        path = input_path(host.url("/x/y"))
        path.filename = cog.types.get_filename(f"https://example.com/x/{end}")
        assert path.convert().name == name
    path.unlink()
    assert list(made.iterdir()) == []


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
        fails_and_leaves_nothing(
            made, host.url("/a.png?token=x"), r"/a\.png: it is larger than the 100\.0 kB"
        )
    with Host({"/a.png": Served(bytes(100_000), length=length)}) as host:
        assert input_path(host.url("/a.png")).convert().stat().st_size == 100_000


def test_a_connection_that_breaks_leaves_no_file(made):
    with Host({"/a.png": Served(bytes(100_000), truncate_at=60_000)}) as host:
        fails_and_leaves_nothing(
            made, host.url("/a.png"), "the connection ended after 60,000 of 100,000 bytes"
        )


def test_a_host_that_trickles_leaves_no_file(made, monkeypatch):
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.4)
    with Host({"/a.png": Served(bytes(1000), piece=1, pause=0.02)}) as host:
        fails_and_leaves_nothing(made, host.url("/a.png"), "too slow")


def test_a_full_disk_is_reported_and_leaves_no_file(made, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with Host({"/a.png": Served(bytes(1000))}) as host:
        fails_and_leaves_nothing(made, host.url("/a.png"), "The disk is full")


def test_a_request_that_is_cancelled_while_it_fetches_leaves_no_file(made, monkeypatch):
    class CancelledError(BaseException):
        pass

    def cancelled(*_: object) -> int:
        raise CancelledError

    monkeypatch.setattr(os, "pwrite", cancelled)
    with Host({"/a.png": Served(bytes(1000))}) as host, pytest.raises(CancelledError):
        input_path(host.url("/a.png")).convert()
    assert list(made.iterdir()) == []


def without_fields(self, *, source, filename, fileobj):
    self.url, self.name_of_file, self.stream, self.temporary = source, filename, fileobj, None


def with_an_argument(self, folder):
    raise AssertionError


CHANGES = {
    "URLFile renamed": ("URLFile", None, None),
    "URLPath renamed": ("URLPath", None, None),
    "Path.validate renamed": ("Path", "validate", None),
    "Path.validate returning text": ("Path", "validate", staticmethod(str)),
    "__wrapped__ removed": ("URLFile", "__wrapped__", None),
    "__wrapped__ a method": ("URLFile", "__wrapped__", lambda self: None),
    "read defined": ("URLFile", "read", lambda self: b""),
    "__getattr__ removed": ("URLFile", "__getattr__", None),
    "convert removed": ("URLPath", "convert", None),
    "convert with an argument": ("URLPath", "convert", with_an_argument),
    "unlink removed": ("URLPath", "unlink", None),
    "source, filename, fileobj and _path renamed": ("URLPath", "__init__", without_fields),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cog_with_other_members_ends_the_start(monkeypatch, change):
    owner, member, value = CHANGES[change]
    # What install() itself replaces is put back too.
    monkeypatch.setattr(cog.types.URLFile, "__wrapped__", cog.types.URLFile.__wrapped__)
    monkeypatch.setattr(cog.types.URLPath, "convert", cog.types.URLPath.convert)
    monkeypatch.setattr(cog.types.URLPath, "unlink", cog.types.URLPath.unlink)
    monkeypatch.setattr(cog.types.Path, "validate", vars(cog.types.Path)["validate"])
    if member is None:
        monkeypatch.delattr(cog.types, owner)
    elif value is None:
        monkeypatch.delattr(getattr(cog.types, owner), member)
    else:
        monkeypatch.setattr(getattr(cog.types, owner), member, value, raising=False)
    with pytest.raises(input_files.IncompatibleCogError, match=r"cog .* is not supported: in cog\.types"):
        start_video(task="t2v")


@pytest.mark.parametrize("field", ["source", "filename", "_path", "fileobj"])
def test_a_cog_whose_inputs_lack_a_field_ends_the_start(monkeypatch, field):
    original = cog.types.URLPath.__init__

    def without(self, **fields):
        original(self, **fields)
        delattr(self, field)

    monkeypatch.setattr(cog.types.URLPath, "__init__", without)
    with pytest.raises(input_files.IncompatibleCogError, match=field):
        input_files.install()


REFUSED = {
    "": "the file is empty text",
    "   ": "the file is empty text",
    "data:": "the data URI has no comma",
    "data:image/png;base64": "the data URI has no comma",
    "data:,": "the data URI holds no file",
    "data:image/png;base64,": "the data URI holds no file",
    "data:image/png;base64,A": "the data URI is not complete, or not base64",
    "data:image/png;base64,no base64!": "the data URI is not complete, or not base64",
    "data:image/png;base64,\ud800": "the data URI is not complete, or not base64",
    "https://[": "malformed host.* is not an address",
    "https://": "is not an address",
    "HTTPS://[::1": "is not an address",
    "https://example.com:port/a.png": "is not an address",
    "ftp://user:secret@example.com/a.png": "'ftp://example.com/a.png' cannot be fetched, only https://",
    "s3://bucket/a.png": "cannot be fetched, only https:// addresses",
    "iVBORw0KGgo" * 400_000: "looks like base64 alone",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:30] or "empty")
def test_what_is_no_file_is_refused_with_what_is_allowed(made, text):
    with pytest.raises(UserError, match=REFUSED[text]) as refused:
        cog.types.Path.validate(text)
    message = str(refused.value)
    assert "data:image/png;base64,..." in message
    assert len(message) < 400 and "secret" not in message
    assert list(made.iterdir()) == []


HELLO = {
    "data:text/plain;base64,aGVsbG8=",
    "DATA:text/plain;BASE64,aGVsbG8=",
    "data:text/plain;charset=utf-8;base64,aGVsbG8",
    "data:;base64,aGVs\nbG8=",
    "data:text/plain;base64,aGVsbG8%3D",
    "data:,hello",
    "data:text/plain,%68ello",
    "  data:text/plain;base64,aGVs bG8= ",
}


@pytest.mark.parametrize("uri", sorted(HELLO))
def test_data_uris_of_every_form_are_files(made, uri):
    assert input_path(uri).convert().read_bytes() == b"hello"


def test_the_alphabet_for_urls_is_read(made):
    assert input_path("data:;base64,-_-_").convert().read_bytes() == bytes([251, 255, 191])


def test_a_scheme_in_capitals_is_a_scheme(made):
    with Host({"/a.png": Served(b"hello")}) as host:
        address = host.url("/a.png").replace("http:", "HTTP:")
        assert input_path(address).convert().read_bytes() == b"hello"


def test_a_path_on_the_server_is_not_repeated_at_length(monkeypatch):
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES", raising=False)
    with pytest.raises(UserError, match="is a path on the server; give a data URI") as refused:
        input_files.check_file("a b/" * 1000)
    assert len(str(refused.value)) < 400


def test_files_of_a_request_go_with_it_when_another_input_fails(made):
    with Host({"/a.png": Served(b"hello")}) as host:
        first, second = input_path(host.url("/a.png")), input_path(host.url("/missing.png"))
        converted = first.convert()
        assert list(made.rglob("*.png")) == [converted]
        with pytest.raises(UserError, match="nothing at this address"):
            second.convert()
    del first, second, converted  # as Cog drops a request
    gc.collect()
    assert list(made.iterdir()) == []
