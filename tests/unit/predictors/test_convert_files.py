"""Checkpoints by upload, address and path: which are taken, what is kept of them and what is not."""

import random
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.network import http, partial_file
from lib.network.http import FetchError
from lib.network.urls import request_rules
from lib.predictors import convert_files as module
from lib.predictors.convert_files import Given, brought
from tests.http_host import Host, Served

CHUNK = 50_000
BODY = random.Random(1).randbytes(6 * CHUNK + 17)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(partial_file, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    return tmp_path / "cache" / "checkpoints"


def at(address: str) -> Given:
    return Given(slot="transformer", address=address)


def fetched(address: str, tmp_path: Path, *, lines: list[str] | None = None, stop=None):
    report = (lines if lines is not None else []).append
    return brought(at(address), work=tmp_path / "work", report=report, stop=stop)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


# Addresses


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("https://127.0.0.1/model.pt", "leads to the private address 127.0.0.1"),
        ("https://10.1.2.3:8443/model.pt", "leads to the private address 10.1.2.3"),
        ("https://[::1]/model.pt", "leads to the private address ::1"),
        ("https://169.254.169.254/latest/meta-data", "leads to the private address 169.254.169.254"),
        ("http://example.com/model.pt", "is not encrypted; give an https:// address or upload the file."),
        ("ftp://example.com/model.pt", "is not an address this service fetches"),
        ("https://me:secret@example.com/model.pt", "give it without a user or escapes"),
        ("/etc/passwd", "transformer_url='/etc/passwd' is no address"),
        ("file:///etc/passwd", "transformer_url='file:///etc/passwd' is no address"),
        ("owner/name", "transformer_url='owner/name' is no address"),
    ],
)
def test_a_request_may_not_name_private_addresses_or_the_servers_files(
    monkeypatch, tmp_path, cache, address, said
):
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    with pytest.raises(UserError) as caught, fetched(address, tmp_path):
        pass
    assert said in str(caught.value) and "secret" not in str(caught.value)
    assert not cache.exists()


def test_an_upload_and_an_address_together_are_refused():
    with pytest.raises(UserError, match=r"^Give vae or vae_url, not both\.$"):
        Given(slot="vae", upload=Path("a.pt"), address="https://example.com/a.pt")
    assert not Given(slot="vae", address="  ")


def test_nothing_given_is_nothing(tmp_path):
    with brought(Given(slot="vae"), work=tmp_path) as path:
        assert path is None


def test_an_address_is_fetched_under_its_own_name_and_goes_when_it_was_used(tmp_path, cache):
    lines: list[str] = []
    with Host({"/a/my model.pt": Served(BODY)}) as host:
        with fetched(host.url("/a/my%20model.pt?token=secret"), tmp_path, lines=lines) as path:
            assert path.name == "my_model.pt" and path.read_bytes() == BODY
        assert len(host.bodies("/a/my model.pt")) == 7
    assert names(cache) == [] and lines[0].startswith("my_model.pt: downloading 300.0 kB")


def test_a_cancelled_download_goes_on_where_it_was(tmp_path, cache):
    stop = threading.Event()
    with Host({"/a.pt": Served(BODY, pause=0.01, piece=5000)}) as host:
        url = host.url("/a.pt")

        def cancel() -> None:
            while host.sent.get("/a.pt", 0) < 5 * CHUNK:
                time.sleep(0.005)
            stop.set()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(Stopped), fetched(url, tmp_path, stop=stop):
            pass
        thread.join()
        kept = names(cache)
        if kept:  # a range at least was whole
            assert kept == ["a.pt.partial", "a.pt.partial.journal"]
        asked = len(host.bodies("/a.pt"))
        host.files["/a.pt"].pause = 0.0
        with fetched(url, tmp_path) as path:
            assert path.read_bytes() == BODY
        assert kept and len(host.bodies("/a.pt")) - asked < 7
    assert names(cache) == []


def test_what_was_cancelled_while_it_was_used_is_not_fetched_again(tmp_path, cache):
    with Host({"/a.pt": Served(BODY)}) as host:
        with pytest.raises(Stopped), fetched(host.url("/a.pt"), tmp_path):
            raise Stopped
        assert names(cache) == ["a.pt"]
        before = len(host.requests)
        with fetched(host.url("/a.pt"), tmp_path) as path:
            assert path.read_bytes() == BODY
        assert len(host.requests) == before
    assert names(cache) == []


def test_what_could_not_be_used_is_fetched_anew_because_it_may_be_mended(tmp_path, cache):
    with Host({"/a.pt": Served(b"damaged")}) as host:
        with pytest.raises(UserError), fetched(host.url("/a.pt"), tmp_path):
            raise UserError("damaged")
        assert names(cache) == []
        host.files["/a.pt"] = Served(BODY, etag='"second"')
        with fetched(host.url("/a.pt"), tmp_path) as path:
            assert path.read_bytes() == BODY


def test_a_file_beyond_the_bound_is_refused_before_it_is_fetched(monkeypatch, tmp_path, cache):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with Host({"/a.pt": Served(BODY)}) as host:
        told = pytest.raises(FetchError, match=r"larger than the 1\.0 kB that are allowed")
        with told, fetched(host.url("/a.pt"), tmp_path):
            pass
        assert [asked for _, asked, _ in host.requests] == ["bytes=0-0"]  # the probe
    assert names(cache) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_host_that_drips_is_given_up(monkeypatch, tmp_path, cache, ranges):
    monkeypatch.setattr(module, "FETCH_SECONDS", 0.3)
    served = Served(BODY[: 2 * CHUNK], ranges=ranges, pause=0.1, piece=100)
    told = pytest.raises(FetchError, match="the host is too slow")
    with Host({"/a.pt": served}) as host, told, fetched(host.url("/a.pt"), tmp_path):
        pass
    assert names(cache) == []


def test_an_end_bounds_all_responses_together(monkeypatch):
    rules = request_rules(seconds=-1)
    with Host({"/a": Served(b"x")}) as host, pytest.raises(FetchError, match="the host is too slow"):
        http.read(http.Source(url=host.url("/a"), rules=rules))


def test_only_the_newest_unfinished_downloads_stay(tmp_path, cache):
    for place in range(5):
        folder = cache / f"old-{place}"
        folder.mkdir(parents=True)
        (folder / "a.pt.partial").write_bytes(b"x")
    with Host({"/a.pt": Served(BODY)}) as host, fetched(host.url("/a.pt"), tmp_path):
        kept = sorted(path.name for path in cache.iterdir() if path.name.startswith("old-"))
    assert len(kept) == module.KEPT - 1


@pytest.mark.parametrize(
    ("address", "url"),
    [
        (
            "https://huggingface.co/o/n/blob/main/a/vae.pt#x",
            "https://huggingface.co/o/n/resolve/main/a/vae.pt",
        ),
        ("https://example.com/blob/vae.pt", "https://example.com/blob/vae.pt"),
    ],
)
def test_a_page_of_the_hub_means_its_file(address, url):
    assert module._direct(address) == url


# Files


def test_a_path_of_this_machine_is_taken_as_it_is_where_that_is_allowed(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"x")
    with brought(at(str(tmp_path / "a.pt")), work=tmp_path / "work") as path:
        assert path == tmp_path / "a.pt"
    told = pytest.raises(UserError, match=r"^There is no file or folder .*none\.pt\.$")
    with told, brought(at(f"file://{tmp_path}/none.pt"), work=tmp_path / "work"):
        pass
    told = pytest.raises(UserError, match=r"_url='a\.pt' is not the whole path, and the server stands in a")
    with told, brought(at("a.pt"), work=tmp_path / "work"):
        pass
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("uploaded", "shown"), [("file.bin", "vae.bin"), ("3d-vae.pt", "3d-vae.pt"), ("", "vae")]
)
def test_an_upload_is_called_as_its_sender_knows_it(monkeypatch, tmp_path, uploaded, shown):
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    path = tmp_path / f"tmpab12cd_x{uploaded}"
    path.write_bytes(b"content")
    with brought(Given(slot="vae", upload=path), work=tmp_path / "work") as found:
        assert found.name == shown and found.read_bytes() == b"content"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_is_unpacked_within_its_bound(monkeypatch, tmp_path, kind):
    (tmp_path / "latest").write_text("1")
    archive = tmp_path / f"transformer.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as members:
            members.write(tmp_path / "latest", "transformer/latest")
    else:
        with tarfile.open(archive, "w") as members:
            members.add(tmp_path / "latest", "transformer/latest")
    with brought(Given(slot="transformer", upload=archive), work=tmp_path / "work") as folder:
        assert folder.name == archive.name
        assert (folder / "transformer" / "latest").read_text() == "1"
    monkeypatch.setattr(module, "MAX_BYTES", 0)
    told = pytest.raises(UserError, match="unpacks to more than the 0 bytes that are allowed")
    with told, brought(Given(slot="transformer", upload=archive), work=tmp_path / "other"):
        pass
