"""Checkpoints by upload, address and path: which are accepted, and which downloads are kept."""

import random
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from lib.cancellation import RequestStop, Stopped, TimeLimitError
from lib.convert.request import model_request
from lib.errors import UserError
from lib.network import http, partial_file
from lib.network.http import FetchError
from lib.network.urls import request_rules
from lib.predictors import convert_files as module
from lib.predictors.convert import convert_model
from lib.predictors.convert_files import CheckpointInput, resolve_input
from tests import convert_factory as factory
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


def at(address: str) -> CheckpointInput:
    return CheckpointInput(name="transformer", address=address)


def fetched(address: str, tmp_path: Path, *, lines: list[str] | None = None, stop=None):
    report = (lines if lines is not None else []).append
    return resolve_input(at(address), work=tmp_path / "work", report=report, stop=stop)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


# Addresses


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://127.0.0.1/model.pt", "leads to the private address 127.0.0.1"),
        ("https://10.1.2.3:8443/model.pt", "leads to the private address 10.1.2.3"),
        ("https://[::1]/model.pt", "leads to the private address ::1"),
        ("https://169.254.169.254/latest/meta-data", "leads to the private address 169.254.169.254"),
        ("http://example.com/model.pt", "is not encrypted; give an https:// address or upload the file."),
        ("ftp://example.com/model.pt", "is not an address this service fetches"),
        ("https://me:secret@example.com/model.pt", "give it without a user or escapes"),
        ("/etc/passwd", "transformer_url='/etc/passwd' is not an address"),
        ("file:///etc/passwd", "transformer_url='file:///etc/passwd' is not an address"),
        ("owner/name", "transformer_url='owner/name' is not an address"),
    ],
)
def test_a_request_may_not_name_private_addresses_or_the_servers_files(
    monkeypatch, tmp_path, cache, address, message
):
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    with pytest.raises(UserError) as caught, fetched(address, tmp_path):
        pass
    assert message in str(caught.value) and "secret" not in str(caught.value)
    assert not cache.exists()


@pytest.mark.parametrize("address", ["https://[", "https://]", "https://", "https://a:b/c.pt"])
def test_an_address_that_is_none_is_named(tmp_path, cache, address):
    refused = pytest.raises(UserError, match="is not an address; give one that begins with https://")
    with refused, fetched(address, tmp_path):
        pass
    assert not cache.exists()


def test_an_upload_and_an_address_together_are_refused():
    with pytest.raises(UserError, match=r"^Give vae or vae_url, not both\.$"):
        CheckpointInput(name="vae", upload=Path("a.pt"), address="https://example.com/a.pt")
    assert not CheckpointInput(name="vae", address="  ")


def test_no_input_resolves_to_none(tmp_path):
    with resolve_input(CheckpointInput(name="vae"), work=tmp_path) as path:
        assert path is None


def test_a_download_has_its_own_name_and_is_deleted_after_use(tmp_path, cache):
    lines: list[str] = []
    with Host({"/a/my model.pt": Served(BODY)}) as host:
        with fetched(host.url("/a/my%20model.pt?token=secret"), tmp_path, lines=lines) as path:
            assert path.name == "my_model.pt" and path.read_bytes() == BODY
        assert len(host.bodies("/a/my model.pt")) == 7
    assert names(cache) == [] and lines[0].startswith("my_model.pt: downloading 300.0 kB")


def test_a_cancelled_download_is_resumed(tmp_path, cache):
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
        if kept:  # at least one range was complete
            assert kept == ["a.pt.partial", "a.pt.partial.journal"]
        asked = len(host.bodies("/a.pt"))
        host.files["/a.pt"].pause = 0.0
        with fetched(url, tmp_path) as path:
            assert path.read_bytes() == BODY
        assert kept and len(host.bodies("/a.pt")) - asked < 7
    assert names(cache) == []


def test_a_download_survives_a_cancelled_conversion(tmp_path, cache):
    with Host({"/a.pt": Served(BODY)}) as host:
        with pytest.raises(Stopped), fetched(host.url("/a.pt"), tmp_path):
            raise Stopped
        assert names(cache) == ["a.pt"]
        before = len(host.requests)
        with fetched(host.url("/a.pt"), tmp_path) as path:
            assert path.read_bytes() == BODY
        assert len(host.requests) == before
    assert names(cache) == []


def test_a_file_that_could_not_be_used_is_downloaded_again(tmp_path, cache):
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
        refused = pytest.raises(FetchError, match=r"larger than the 1\.0 kB that are allowed")
        with refused, fetched(host.url("/a.pt"), tmp_path):
            pass
        assert [asked for _, asked, _ in host.requests] == ["bytes=0-0"]  # the probe
    assert names(cache) == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_slow_host_is_given_up_when_the_requests_time_is_over(tmp_path, cache, ranges):
    served = Served(BODY[: 2 * CHUNK], ranges=ranges, pause=0.1, piece=100)
    refused, stop = pytest.raises(TimeLimitError, match=r"longer than 0\.3 s"), RequestStop(0.3)
    with Host({"/a.pt": served}) as host, refused, fetched(host.url("/a.pt"), tmp_path, stop=stop):
        pass
    assert not [name for name in names(cache) if name == "a.pt"]


def test_an_end_bounds_all_responses_together(monkeypatch):
    rules = request_rules(seconds=-1)
    with Host({"/a": Served(b"x")}) as host, pytest.raises(FetchError, match="the host is too slow"):
        http.read(http.Source(url=host.url("/a"), rules=rules))


def test_only_the_newest_unfinished_downloads_are_kept(tmp_path, cache):
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
def test_a_page_on_the_hub_means_its_file(address, url):
    assert module._file_url(address) == url


# Files


def test_a_local_path_is_accepted_where_that_is_allowed(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"x")
    with resolve_input(at(str(tmp_path / "a.pt")), work=tmp_path / "work") as path:
        assert path == tmp_path / "a.pt"
    refused = pytest.raises(UserError, match=r"^There is no file or folder .*none\.pt\.$")
    with refused, resolve_input(at(f"file://{tmp_path}/none.pt"), work=tmp_path / "work"):
        pass
    refused = pytest.raises(
        UserError, match=r"_url='a\.pt' is a relative path, and the server runs in a folder"
    )
    with refused, resolve_input(at("a.pt"), work=tmp_path / "work"):
        pass
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("uploaded", "shown"), [("file.bin", "vae.bin"), ("3d-vae.pt", "3d-vae.pt"), ("file", "vae")]
)
def test_an_upload_has_the_senders_file_name_or_the_inputs(tmp_path, uploaded, shown):
    path = tmp_path / uploaded
    path.write_bytes(b"content")
    with resolve_input(CheckpointInput(name="vae", upload=path), work=tmp_path / "work") as found:
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
    with resolve_input(CheckpointInput(name="transformer", upload=archive), work=tmp_path / "work") as folder:
        assert folder.name == archive.name
        assert (folder / "transformer" / "latest").read_text() == "1"
    monkeypatch.setattr(module, "MAX_BYTES", 0)
    refused = pytest.raises(UserError, match="unpacks to more than the 0 bytes that are allowed")
    with refused, resolve_input(CheckpointInput(name="transformer", upload=archive), work=tmp_path / "other"):
        pass


def test_the_zip_of_a_sat_download_becomes_a_model_without_leftovers(tmp_path):
    with zipfile.ZipFile(tmp_path / "sat.zip", "w") as archive:
        archive.write(factory.source("t2v-2b"), "transformer/1000/mp_rank_00_model_states.pt")
        archive.writestr("transformer/latest", "1000")
    inputs = {"direction": "to_diffusers", "family": "auto", "dtype": "auto", "vae_dtype": "auto"}
    inputs |= {"text_encoder": False, "overrides": "", "hub_repository": ""}
    result = convert_model(
        model_request(inputs, has_transformer=True, has_vae=False),
        CheckpointInput(name="transformer", upload=tmp_path / "sat.zip"),
        CheckpointInput(name="vae"),
        tmp_path / "out",
        work=tmp_path / "work",
        report=factory.silent,
        stop=threading.Event(),
    )
    assert result.parts[0].source == "sat.zip (1000/mp_rank_00_model_states.pt)"
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"README.md", "model_index.json", "report.json", "scheduler", "transformer"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sat.zip"]
