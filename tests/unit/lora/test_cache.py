"""LoRAs are downloaded once, from hosts, the Hub, archives and URIs; failures leave nothing."""

import base64
import hashlib
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.lora import cache as lora_cache
from lib.lora import source as lora_source
from lib.lora.cache import LocalLora, choose, locate
from lib.lora.source import parse
from lib.network import http
from tests.http_host import Host, Served, hub_of

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "c" * 40


def weights(value: float, size: int = 50) -> bytes:
    return save({"a": torch.full((size, size), value)})


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    monkeypatch.setenv("COGVIDEOX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loras"


def located(source: str, **options) -> LocalLora:
    trusted = options.pop("trusted", False)
    address = parse(source, trusted=trusted)
    return locate(address, report=lambda line: None, **options)


def value_of(found: LocalLora) -> float:
    return load_file(found.file)["a"][0, 0].item()


def leftovers(cache: Path) -> list[str]:
    """Return what is in the cache in addition to complete entries."""
    names = [path.name for path in cache.iterdir()] if cache.exists() else []
    return [name for name in names if "." in name]


def tar_of(path: Path, files: dict[str, bytes], mode: str = "w") -> bytes:
    folder = path.parent / "to_pack"
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            tar.add(folder / name, name)
    return path.read_bytes()


def test_an_address_is_downloaded_once_and_another_query_is_another_address(cache):
    with Host({"/a.safetensors": Served(weights(1))}) as host:
        for _ in range(2):
            assert value_of(located(host.url("/a.safetensors"))) == 1
        assert len(host.requests) == 1
        located(host.url("/a.safetensors?version=2"))
        assert len(host.requests) == 2
    assert leftovers(cache) == []
    records = [json.loads(path.read_text()) for path in cache.glob("*/source.json")]
    assert {record["source"] for record in records} == {host.url("/a.safetensors")}
    assert records[0]["sha256"] == hashlib.sha256(weights(1)).hexdigest()


def test_only_the_owner_can_read_what_is_cached_whatever_the_umask(tmp_path, cache):
    before = os.umask(0)
    try:
        with Host({"/a.safetensors": Served(weights(1))}) as host:
            found = located(host.url("/a.safetensors"))
    finally:
        os.umask(before)
    for path in [cache, *cache.rglob("*")]:
        allowed = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) & ~allowed == 0 or path.name.endswith(".lock"), path
    assert stat.S_IMODE(found.file.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("folder", ["", "output/"])
def test_a_trainings_tar_gives_its_lora_and_configuration(tmp_path, cache, mode, folder):
    files = {
        f"{folder}lora.safetensors": weights(3),
        f"{folder}captions/1.txt": b"x",
        f"{folder}checkpoint/state/lora.safetensors": weights(9),
        f"{folder}adapter_config.json": b'{"lora_alpha": 7}',
    }
    body = tar_of(tmp_path / "a.tar", files, mode)
    with Host({"/out/trained_model.tar": Served(body)}) as host:
        found = located(host.url("/out/trained_model.tar"))
    assert value_of(found) == 3 and found.config == {"lora_alpha": 7}
    assert sorted(path.name for path in found.file.parent.iterdir()) == [
        "adapter_config.json",
        "lora.safetensors",
        "source.json",
    ]


def test_local_files_and_folders_are_not_copied_and_tars_are_unpacked(tmp_path, cache):
    file = tmp_path / "here" / "style.safetensors"
    file.parent.mkdir()
    file.write_bytes(weights(4))
    assert located(str(file)).file == file
    assert located(str(file.parent)).file == file
    assert not cache.exists()
    tar_of(tmp_path / "a.tar", {"lora.safetensors": weights(5)})
    assert value_of(located(str(tmp_path / "a.tar"))) == 5
    assert (tmp_path / "a.tar").exists()


def test_a_data_uri_is_cached_by_its_content(cache):
    uri = "data:application/octet-stream;base64," + base64.b64encode(weights(6)).decode()
    assert value_of(located(uri)) == 6
    assert located(uri).file == next(cache.glob("*/lora.safetensors"))


@pytest.fixture
def hub(monkeypatch):
    with Host() as host:
        monkeypatch.setenv("HF_ENDPOINT", host.address)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield host


def test_a_repositorys_lora_is_downloaded_at_the_listed_commit(hub, cache):
    files = {"pytorch_lora_weights.safetensors": weights(1), "extra.safetensors": weights(2)}
    hub.files = hub_of("o/n", files, commit=COMMIT)
    found = located("o/n")
    assert value_of(found) == 1
    record = json.loads((found.file.parent / "source.json").read_text())
    assert (record["source"], record["commit"]) == ("o/n", COMMIT)
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, _, headers in hub.requests)
    asked = len(hub.requests)
    assert value_of(located("https://huggingface.co/o/n")) == 1
    assert len(hub.requests) == asked, "the same repository was asked again"
    assert value_of(located("o/n/extra.safetensors")) == 2


def test_the_configuration_of_a_peft_repository_is_downloaded_too(hub):
    config = {"r": 4, "lora_alpha": 9}
    files = {
        "sub/adapter_model.safetensors": weights(1),
        "sub/adapter_config.json": json.dumps(config).encode(),
    }
    hub.files = hub_of("o/n", files, commit=COMMIT)
    assert located("o/n/sub").config == config


def test_a_private_hub_endpoint_is_allowed_where_private_addresses_are_not(hub, monkeypatch):
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    hub.files = hub_of("o/n", {"lora.safetensors": weights(1)}, commit=COMMIT)
    assert value_of(located("o/n")) == 1
    with pytest.raises(UserError, match="is not encrypted"):
        located(hub.address.replace("127.0.0.1", "localhost") + "/lora.safetensors")


@pytest.mark.parametrize(("listed", "sent"), [("", 0), ("x/y", 0), ("o/n", 2), ("x/y, O/*", 2)])
def test_a_request_uses_the_operators_token_only_for_listed_repositories(hub, monkeypatch, listed, sent):
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    monkeypatch.setenv("COGVIDEOX_HUB_REPOSITORIES", listed)
    hub.files = hub_of("o/n", {"lora.safetensors": weights(1)}, commit=COMMIT)
    assert value_of(located("o/n")) == 1
    assert [headers.get("Authorization") for _, _, headers in hub.requests].count("Bearer hf_secret") == sent
    assert len(hub.requests) == 2


def test_a_private_lora_in_the_cache_is_not_for_requests_without_the_token(hub, monkeypatch):
    hub.files = hub_of("o/n", {"lora.safetensors": weights(1)}, commit=COMMIT)
    assert value_of(located("o/n")) == 1
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    hub.files = {}
    with pytest.raises(UserError, match="has no repository o/n, or it is private") as caught:
        located("o/n")
    assert "lora.safetensors" not in str(caught.value)


def test_a_redirect_of_the_hub_to_a_private_address_is_refused(hub, cache, monkeypatch):
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    hub.files = hub_of("o/n", {"lora.safetensors": weights(1)}, commit=COMMIT)
    elsewhere = hub.address.replace("127.0.0.1", "localhost") + "/x"
    hub.files[f"/o/n/resolve/{COMMIT}/lora.safetensors"] = Served(
        b"", status=302, headers={"Location": elsewhere}
    )
    with pytest.raises(UserError, match="is not encrypted"):
        located("o/n")
    assert leftovers(cache) == []


def test_a_name_unknown_to_the_hub_is_refused_with_a_hint_about_replicate(hub):
    refusal = {"X-Error-Code": "RepoNotFound"}
    hub.files["/api/models/o/n/revision/main"] = Served(b"", status=401, headers=refusal)
    with pytest.raises(UserError, match="no repository o/n") as caught:
        located("o/n")
    assert "trained on Replicate give the address of its weights, https://" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        (["a.safetensors", "b.safetensors"], "o/n", "several .safetensors files: a.safetensors, b"),
        (["lora.bin", "x.txt"], "o/n", "has no .safetensors file; lora.bin could run any code"),
        (["x.txt"], "o/n", "has no .safetensors file. Give"),
        (["a.safetensors"], "o/n/b.safetensors", "has no file 'b.safetensors' at main. It has: a.saf"),
    ],
)
def test_a_repository_without_an_unambiguous_lora_is_refused_with_its_files(
    hub, cache, files, source, message
):
    hub.files = hub_of("o/n", {name: weights(1) for name in files}, commit=COMMIT)
    with pytest.raises(UserError) as caught:
        located(source)
    assert message in str(caught.value)
    assert not any("/resolve/" in path for path, _, _ in hub.requests)
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("paths", "chosen"),
    [
        (["x/y.safetensors"], "x/y.safetensors"),
        (["lora.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"),
        (["a/lora.safetensors", "lora.safetensors", "other.safetensors"], "lora.safetensors"),
        (["__MACOSX/._lora.safetensors", "lora.safetensors", ".x/lora.safetensors"], "lora.safetensors"),
        (["a/lora.safetensors", "b/lora.safetensors"], None),
    ],
)
def test_the_lora_among_several_files_is_the_topmost_with_a_usual_name(paths, chosen):
    if chosen is None:
        with pytest.raises(UserError, match="has several"):
            choose(paths, name="it")
    else:
        assert choose(paths, name="it") == chosen


def test_an_operators_address_may_be_private_and_unencrypted(monkeypatch):
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES")
    with Host({"/a.safetensors": Served(weights(1))}) as host:
        assert value_of(located(host.url("/a.safetensors"), trusted=True)) == 1
        with pytest.raises(UserError, match="is not encrypted"):
            located(host.url("/a.safetensors?"))


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (Served(b"", status=404), "the host has nothing at this address"),
        (Served(b"<html>"), "a web page, not the file itself"),
        (Served(weights(1), truncate_at=3000), "the connection ended"),
        (Served(weights(1), fail_first=99), "overloaded or failing"),
        (Served(bytes(200_000)), "larger than the 100.0 kB that are allowed"),
        (Served(bytes(200_000), length=False), "larger than the 100.0 kB that are allowed"),
    ],
)
def test_a_failed_download_says_why_and_leaves_nothing(cache, monkeypatch, served, message):
    monkeypatch.setattr(lora_source, "MAX_FILE_BYTES", 100_000)
    with Host({"/a.safetensors": served}) as host, pytest.raises(UserError) as caught:
        located(host.url("/a.safetensors"))
    assert message in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_dropped_connection_is_retried():
    with Host({"/a.safetensors": Served(weights(2), drop_first_at=3000)}) as host:
        assert value_of(located(host.url("/a.safetensors"))) == 2


def test_a_tar_with_a_path_outside_is_refused_and_leaves_nothing(tmp_path, cache):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        tar.add(__file__, "../outside.safetensors")
    message = r"bad\.tar' cannot be unpacked.*would leave the target folder"
    served = Served((tmp_path / "bad.tar").read_bytes())
    with Host({"/bad.tar": served}) as host, pytest.raises(UserError, match=message):
        located(host.url("/bad.tar"))
    assert list(cache.iterdir()) == []


def test_an_archive_with_too_much_content_is_refused(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(lora_cache, "MAX_UNPACKED_BYTES", 100_000)
    body = tar_of(tmp_path / "bomb.tar", {"lora.safetensors": bytes(10**6)}, "w:gz")
    with Host({"/bomb.tar": Served(body)}) as host, pytest.raises(UserError, match="unpacks to more than"):
        located(host.url("/bomb.tar"))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("served", [{"stall_at": 65536}, {"pause": 0.05, "piece": 4096}, {"stall_at": 0}])
def test_a_cancelled_download_ends_although_its_host_stalls_and_leaves_nothing(cache, served):
    stop, ended = threading.Event(), threading.Event()

    def fetch(address: str) -> None:
        with pytest.raises(Stopped):
            located(address, stop=stop)
        ended.set()

    with Host({"/a.safetensors": Served(weights(1, 500), **served)}) as host:
        threading.Thread(target=fetch, args=[host.url("/a.safetensors")], daemon=True).start()
        threading.Timer(0.4, stop.set).start()
        assert ended.wait(20)  # the stall would last 30
        assert not host.released.is_set() and host.sent.get("/a.safetensors", 0) < len(weights(1, 500))
    assert list(cache.iterdir()) == []


def test_the_least_recently_used_entry_is_removed_when_the_cache_is_full(cache, monkeypatch):
    size = len(weights(0))
    monkeypatch.setenv("COGVIDEOX_LORA_CACHE_GB", str(2.5 * (size + 500) / 1e9))
    with Host({f"/{i}.safetensors": Served(weights(i)) for i in range(3)}) as host:
        for order, index in enumerate((0, 1, 0)):
            os.utime(located(host.url(f"/{index}.safetensors")).file.parent, (order, order))
        located(host.url("/2.safetensors"))
        assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= 2.5 * (size + 500)
        before = len(host.requests)
        located(host.url("/0.safetensors"))
        assert len(host.requests) == before, "what was used last was removed"
        located(host.url("/1.safetensors"))
        assert len(host.requests) == before + 1
    assert leftovers(cache) == []


def test_a_lora_larger_than_the_cache_limit_is_refused(monkeypatch):
    monkeypatch.setenv("COGVIDEOX_LORA_CACHE_GB", "0.000001")
    served = Served(weights(1))
    with Host({"/a.safetensors": served}) as host, pytest.raises(UserError, match="larger than the"):
        located(host.url("/a.safetensors"))


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan", "inf"])
def test_an_invalid_cache_size_is_refused(monkeypatch, text):
    monkeypatch.setenv("COGVIDEOX_LORA_CACHE_GB", text)
    with pytest.raises(UserError, match="is not a size in GB above 0"):
        lora_source.max_bytes()


def test_leftovers_of_a_killed_process_are_removed(cache):
    for name in ("dead.partial", "dead.1234.gone"):
        (cache / name).mkdir(parents=True)
        (cache / name / "download").write_bytes(b"x")
    located("data:x;base64," + base64.b64encode(weights(1)).decode())
    assert leftovers(cache) == []


CHILD = """
import sys
from lib.lora.cache import locate
from lib.lora.source import parse
print(locate(parse(sys.argv[1]), report=lambda line: None).file)
"""


def test_two_processes_at_once_download_once(cache):
    with Host({"/a.safetensors": Served(weights(1, 300), pause=0.05)}) as host:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CHILD, host.url("/a.safetensors")]
        children = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        paths = {child.communicate(timeout=60)[0].strip() for child in children}
        assert [child.returncode for child in children] == [0, 0]
        assert len(host.requests) == 1
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == weights(1, 300)
    assert leftovers(cache) == []
