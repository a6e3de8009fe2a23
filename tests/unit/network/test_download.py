import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.network import http, partial_file
from lib.network.download import fetch
from lib.network.http import FetchError, Source, read
from lib.network.transport import Rules
from lib.storage.disk import NoSpaceError, require_free_space
from tests.http_host import Host, Served

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 100_000
BODY = random.Random(1).randbytes(10 * CHUNK + 12_345)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(partial_file, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))


def quiet(line: str) -> None:
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fetches_in_parallel_ranges_that_cover_the_file_once(tmp_path):
    with Host({"/a.bin": Served(BODY)}) as host:
        path = fetch(host.url("/a.bin"), tmp_path / "out" / "a.bin", sha256=SHA256, report=quiet)
        ranges = host.bodies("/a.bin")
    assert path.read_bytes() == BODY
    assert names(tmp_path / "out") == ["a.bin"]
    assert len(ranges) == 11 and len(set(ranges)) == 11


def test_an_existing_target_is_not_requested(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"whole")
    with Host() as host:
        assert fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet).read_bytes() == b"whole"
        assert host.requests == []


@pytest.mark.parametrize("length", [True, False])
def test_a_host_without_ranges_is_read_in_one_stream(tmp_path, length):
    with Host({"/a.bin": Served(BODY, ranges=False, length=length)}) as host:
        assert fetch(host.url("/a.bin"), tmp_path / "a.bin", sha256=SHA256, report=quiet).read_bytes() == BODY
        assert host.bodies("/a.bin") == [None]
    assert names(tmp_path) == ["a.bin"]


def test_an_empty_file_is_fetched(tmp_path):
    with Host({"/a.bin": Served(b"")}) as host:
        assert fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet).read_bytes() == b""


CHILD = """
import sys
from pathlib import Path
from lib.network import download, http, partial_file
partial_file.CHUNK_BYTES = {chunk}
http.BACKOFF_SECONDS = 0.01
download.fetch(sys.argv[1], Path(sys.argv[2]), sha256="{sha256}", connections=2)
"""


def child(url: str, target: Path) -> subprocess.Popen:
    code = CHILD.format(chunk=CHUNK, sha256=SHA256)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, url, str(target)], env=env, stdout=subprocess.DEVNULL
    )


def test_a_killed_download_is_resumed_without_fetching_everything_again(tmp_path):
    with Host({"/a.bin": Served(BODY, pause=0.03, piece=20_000)}) as host:
        process = child(host.url("/a.bin"), tmp_path / "a.bin")
        while host.sent.get("/a.bin", 0) < len(BODY) // 2:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "a.bin").exists()
        time.sleep(0.1)  # the host notices
        host.files["/a.bin"].pause = 0
        before = host.sent["/a.bin"]
        assert child(host.url("/a.bin"), tmp_path / "a.bin").wait(20) == 0
        again = host.sent["/a.bin"] - before
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert names(tmp_path) == ["a.bin"]
    assert again <= len(BODY) * 0.75


def test_a_file_that_changed_at_the_host_is_not_resumed_with_old_bytes(tmp_path):
    other = bytes(len(BODY))
    with Host({"/a.bin": Served(BODY)}) as host:
        (tmp_path / "a.bin.partial").write_bytes(BODY)
        identity = {
            "url": host.url("/a.bin"),
            "chunk": CHUNK,
            "size": len(BODY),
            "validator": '"first"',
            "ranges": True,
        }
        journal = json.dumps(identity) + "\n" + "".join(f"{index}\n" for index in range(10))
        (tmp_path / "a.bin.partial.journal").write_text(journal)
        host.files["/a.bin"] = Served(other, etag='"second"')
        assert fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet).read_bytes() == other


def test_a_file_that_changes_during_the_download_is_not_mixed(tmp_path):
    with Host({"/a.bin": Served(BODY)}) as host:
        other = bytes(len(BODY))

        def replace(line: str) -> None:  # after the probe, before the ranges
            host.files["/a.bin"] = Served(other, etag='"second"')

        lines = []
        path = fetch(
            host.url("/a.bin"), tmp_path / "a.bin", report=lambda line: (replace(line), lines.append(line))
        )
        assert path.read_bytes() == other
        assert host.bodies("/a.bin")[-1] is None, "in one stream, which cannot mix two versions"
    assert "starting again in one stream" in lines[-1]


def test_a_host_that_stops_serving_ranges_is_read_from_the_start_in_one_stream(tmp_path):
    with Host({"/a.bin": Served(BODY, pause=0.01, piece=20_000)}) as host:
        served = host.files["/a.bin"]

        def stop_ranges(line: str) -> None:
            served.ranges = False  # after the probe, before the ranges

        assert (
            fetch(host.url("/a.bin"), tmp_path / "a.bin", sha256=SHA256, report=stop_ranges).read_bytes()
            == BODY
        )
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_drops_once_is_retried(tmp_path, ranges):
    with Host({"/a.bin": Served(BODY, ranges=ranges, drop_first_at=50_000)}) as host:
        assert fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet).read_bytes() == BODY


def test_a_host_that_is_overloaded_for_a_moment_is_retried(tmp_path):
    with Host({"/a.bin": Served(BODY, fail_first=2)}) as host:
        assert fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet).read_bytes() == BODY


def test_a_body_that_is_always_truncated_fails_and_leaves_nothing(tmp_path):
    with Host({"/a.bin": Served(BODY, ranges=False, truncate_at=5000)}) as host:
        with pytest.raises(FetchError, match=r"/a\.bin: the connection ended after 5,000 of 1,012,345 bytes"):
            fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet)
        assert len(host.bodies("/a.bin")) == http.ATTEMPTS
    assert names(tmp_path) == []


def test_an_error_says_that_the_download_can_be_resumed(tmp_path):
    with Host({"/a.bin": Served(BODY)}) as host:
        served = host.files["/a.bin"]
        reported = []

        def cut(line: str) -> None:
            reported.append(line)

        def cut_later() -> None:
            while host.sent.get("/a.bin", 0) < 5 * CHUNK:
                time.sleep(0.001)
            served.truncate_at = 0

        served.pause, served.piece = 0.01, 20_000
        thread = threading.Thread(target=cut_later)
        thread.start()
        with pytest.raises(FetchError, match=r"kept in a\.bin\.partial and will be continued"):
            fetch(host.url("/a.bin"), tmp_path / "a.bin", report=cut, connections=2)
        thread.join()
        assert names(tmp_path) == ["a.bin.partial", "a.bin.partial.journal"]
        served.truncate_at, before = None, host.sent["/a.bin"]
        assert fetch(host.url("/a.bin"), tmp_path / "a.bin", report=cut).read_bytes() == BODY
        assert host.sent["/a.bin"] - before < len(BODY)
    assert any("continuing at" in line for line in reported)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_wrong_checksum_leaves_nothing(tmp_path, ranges):
    with (
        Host({"/a.bin": Served(BODY, ranges=ranges)}) as host,
        pytest.raises(FetchError, match=f"SHA-256 is {SHA256} instead of {'0' * 64}"),
    ):
        fetch(host.url("/a.bin"), tmp_path / "a.bin", sha256="0" * 64, report=quiet)
    assert names(tmp_path) == []


@pytest.mark.parametrize("length", [True, False])
def test_a_wrong_length_leaves_nothing(tmp_path, length):
    with (
        Host({"/a.bin": Served(BODY, ranges=False, length=length)}) as host,
        pytest.raises(FetchError, match=r"1,012,345 bytes .* 2,000,000"),
    ):
        fetch(host.url("/a.bin"), tmp_path / "a.bin", size=2_000_000, report=quiet)
    assert names(tmp_path) == []


def test_404_is_reported_at_once_and_leaves_nothing(tmp_path):
    with Host() as host:
        with pytest.raises(
            FetchError, match=r"nothing at this address \(HTTP 404\)\. Check the address"
        ) as caught:
            fetch(host.url("/a.bin"), tmp_path / "out" / "a.bin", report=quiet)
        assert len(host.requests) == 1
    assert caught.value.status == 404
    assert names(tmp_path) == []


def test_a_slow_but_steady_host_succeeds_although_it_takes_longer_than_the_timeout(tmp_path):
    body = BODY[:60_000]
    with Host({"/a.bin": Served(body, ranges=False, pause=0.1, piece=6_000)}) as host:
        started = time.monotonic()
        path = fetch(host.url("/a.bin"), tmp_path / "a.bin", timeout=0.5, report=quiet)
    assert time.monotonic() - started > 0.6
    assert path.read_bytes() == body


@pytest.mark.parametrize("ranges", [True, False])
def test_the_error_for_a_silent_host_names_the_timeout(tmp_path, ranges):
    with (
        Host({"/a.bin": Served(BODY, ranges=ranges, stall_at=0)}) as host,
        pytest.raises(FetchError, match=r"the host sent nothing for 0\.2 s"),
    ):
        host.files["/a.bin"].stall_at = 1
        host.files["/a.bin"].piece = 1
        fetch(host.url("/a.bin"), tmp_path / "a.bin", timeout=0.2, report=quiet)
    assert names(tmp_path) == []


def test_a_refused_connection_is_reported(tmp_path):
    with Host() as host:
        url = host.url("/a.bin")
    with pytest.raises(FetchError, match="refuses the connection"):
        fetch(url, tmp_path / "a.bin", report=quiet)


@pytest.mark.parametrize("length", [True, False])
def test_max_bytes_is_enforced_even_when_the_length_is_not_announced(tmp_path, length):
    with (
        Host({"/a.bin": Served(BODY, ranges=False, length=length)}) as host,
        pytest.raises(FetchError, match=r"larger than the 500\.0 kB"),
    ):
        fetch(host.url("/a.bin"), tmp_path / "a.bin", max_bytes=500_000, report=quiet)
    assert names(tmp_path) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a", "a.bin", "http://", "http://[oops/a"])
def test_only_http_addresses_are_fetched(tmp_path, url):
    with pytest.raises(UserError, match="not an http or https address"):
        fetch(url, tmp_path / "a.bin", report=quiet)


def test_messages_leave_out_the_secrets_of_an_address(tmp_path):
    with Host() as host, pytest.raises(FetchError) as caught:
        fetch(host.url("/a.bin?token=secret"), tmp_path / "a.bin", report=quiet)
    assert "/a.bin" in str(caught.value) and "secret" not in str(caught.value)


def test_a_token_does_not_follow_a_redirect_to_another_host(tmp_path):
    with Host({"/a.bin": Served(BODY)}) as storage, Host() as hub:
        location = storage.url("/a.bin").replace("127.0.0.1", "localhost")
        hub.files["/a.bin"] = Served(b"", status=302, headers={"Location": location})
        token = {"Authorization": "Bearer secret", "X-Kept": "yes"}
        assert fetch(hub.url("/a.bin"), tmp_path / "a.bin", headers=token, report=quiet).read_bytes() == BODY
        assert all(headers["Authorization"] == "Bearer secret" for _, _, headers in hub.requests)
        assert all("Authorization" not in headers for _, _, headers in storage.requests)
        assert all(headers["X-Kept"] == "yes" for _, _, headers in storage.requests)


def test_a_redirect_to_another_kind_of_address_is_refused(tmp_path):
    away = Served(b"", status=302, headers={"Location": "ftp://127.0.0.1/etc/passwd"})
    with Host({"/a": away}) as host, pytest.raises(FetchError, match="not to https"):
        fetch(host.url("/a"), tmp_path / "a", report=quiet)


def test_too_little_disk_space_is_reported_before_anything_is_fetched(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with Host({"/a.bin": Served(BODY)}) as host:
        with pytest.raises(NoSpaceError, match=r"1\.0 MB are needed and 1\.0 kB are free"):
            fetch(host.url("/a.bin"), tmp_path / "out" / "a.bin", report=quiet)
        assert host.bodies("/a.bin") == []
    assert names(tmp_path) == []


def test_free_space_is_that_of_the_disk_that_will_hold_the_folder(tmp_path):
    require_free_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(NoSpaceError, match="Free some space"):
        require_free_space(tmp_path / "not" / "yet" / "there", 1 << 60)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_disk_that_fills_up_midway_is_reported_and_freed(tmp_path, monkeypatch, ranges):
    real = os.pwrite

    def full(handle: int, block: bytes, at: int) -> int:
        if at > 500_000:
            raise OSError(28, "No space left on device")
        return real(handle, block, at)

    monkeypatch.setattr(os, "pwrite", full)
    with (
        Host({"/a.bin": Served(BODY, ranges=ranges)}) as host,
        pytest.raises(NoSpaceError, match="disk is full"),
    ):
        fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet)
    assert names(tmp_path) == []


def install_pget(folder: Path, script: str) -> Path:
    folder.mkdir()
    program = folder / "pget"
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


PGET = """
import sys, urllib.request
url, target = sys.argv[1:]
open(target, "xb").write(urllib.request.urlopen(urllib.request.Request(url, headers={"X-By": "pget"})).read())
"""


def test_pget_is_used_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(install_pget(tmp_path / "bin", PGET)))
    with Host({"/a.bin": Served(BODY)}) as host:
        assert fetch(host.url("/a.bin"), tmp_path / "out" / "a.bin", report=quiet).read_bytes() == BODY
        assert [headers.get("X-By", headers.get("X-by")) for _, _, headers in host.requests] == [None, "pget"]
    assert names(tmp_path / "out") == ["a.bin"]


@pytest.mark.parametrize("script", ["raise SystemExit('boom')", PGET.replace(".read()", ".read(1000)")])
def test_a_pget_that_fails_or_stops_short_is_replaced_by_python(tmp_path, monkeypatch, script):
    monkeypatch.setenv("PATH", str(install_pget(tmp_path / "bin", script)))
    lines = []
    with Host({"/a.bin": Served(BODY)}) as host:
        assert fetch(host.url("/a.bin"), tmp_path / "out" / "a.bin", report=lines.append).read_bytes() == BODY
    assert names(tmp_path / "out") == ["a.bin"]
    assert any("continuing without it" in line for line in lines)


def test_pget_is_not_used_with_a_size_limit_or_without_ranges(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(install_pget(tmp_path / "bin", "raise SystemExit('must not run')")))
    lines = []
    with Host({"/a": Served(BODY), "/b": Served(BODY, ranges=False)}) as host:
        fetch(host.url("/a"), tmp_path / "a", max_bytes=2_000_000, report=lines.append)
        fetch(host.url("/b"), tmp_path / "b", report=lines.append)
    assert not any("pget" in line for line in lines)


def test_small_documents_are_read_completely_or_refused():
    with Host({"/a": Served(b"x" * 100), "/b": Served(b"x" * 100, ranges=False, truncate_at=10)}) as host:
        assert read(Source(url=host.url("/a"), max_bytes=100)) == b"x" * 100
        with pytest.raises(FetchError, match="larger"):
            read(Source(url=host.url("/a"), max_bytes=99))
        with pytest.raises(FetchError, match="the connection ended after 10 of 100 bytes"):
            read(Source(url=host.url("/b"), max_bytes=1000))


def test_an_interrupted_call_stops_its_threads(tmp_path):
    class StopError(BaseException):
        pass

    def interrupt(*args: object) -> None:
        raise StopError

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Host({"/a.bin": Served(BODY, pause=0.05, piece=10_000)}) as host:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(StopError):
                fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet)
            assert 0 < host.sent["/a.bin"] < len(BODY)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert not (tmp_path / "a.bin").exists()
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]


FULL = """
import sys
from pathlib import Path
from lib.storage.disk import NoSpaceError
from lib.network.download import fetch
for name in ("announced", "unannounced"):
    try:
        fetch(f"{sys.argv[1]}/{name}", Path(sys.argv[2]) / name, report=lambda line: None)
    except NoSpaceError as error:
        print(error)
print(sorted(path.name for path in Path(sys.argv[2]).iterdir()))
"""


def test_a_really_full_disk_is_reported_and_left_empty(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=400k tmpfs {disk}"
    path = os.defpath + ":/sbin:/usr/sbin"
    unshare = shutil.which("unshare", path=path)
    if not unshare or subprocess.run([unshare, "-Urm", "sh", "-c", mount], env={"PATH": path}).returncode:
        pytest.skip("this machine does not allow mounting a small disk")
    files = {"/announced": Served(BODY), "/unannounced": Served(BODY, ranges=False, length=False)}
    with Host(files) as host:
        run = f'{mount} && exec "$0" -c "$1" "$2" "$3"'
        arguments = [unshare, "-Urm", "sh", "-c", run, sys.executable, FULL, host.address, str(disk)]
        env = {"PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=30)
        assert host.bodies("/announced") == []
    first, second, left = done.stdout.splitlines()
    assert "1.0 MB are needed" in first
    assert "The disk is full" in second
    assert left == "[]"


@pytest.mark.parametrize(
    "served",
    [
        {"stall_at": 0},
        {"stall_at": 1 << 16},
        {"ranges": False, "stall_at": 1 << 16},
        {"pause": 1, "piece": 999},
    ],
    ids=["nothing of a range", "some of a range", "some of a stream", "slow"],
)
def test_a_stopped_download_ends_while_its_host_stalls_and_leaves_nothing_invalid(tmp_path, served):
    stop, target = threading.Event(), tmp_path / "out" / "a.bin"
    with Host({"/a.bin": Served(BODY, **served)}) as host:
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(Stopped):
            fetch(host.url("/a.bin"), target, report=quiet, rules=Rules(stop=stop))
        assert not host.released.is_set()  # or the stalled answers would have ended the wait
        assert names(target.parent) == []


def test_a_stopped_download_is_resumed_by_the_next(tmp_path):
    stop, body = threading.Event(), Served(BODY, pause=0.02, piece=CHUNK // 4)

    def stop_early(line: str) -> None:
        if "%" in line:
            stop.set()

    with Host({"/a.bin": body}) as host, pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_file, "REPORT_SECONDS", 0.2)
        with pytest.raises(Stopped):
            rules = Rules(stop=stop)
            fetch(host.url("/a.bin"), tmp_path / "a.bin", report=stop_early, connections=2, rules=rules)
        assert names(tmp_path) == ["a.bin.partial", "a.bin.partial.journal"]
        before = len(host.bodies("/a.bin"))
        done = len((tmp_path / "a.bin.partial.journal").read_text().splitlines()) - 1
        assert done > 0
        fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet, rules=Rules(stop=threading.Event()))
        assert len(host.bodies("/a.bin")) - before == 11 - done
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_stop_ends_the_waits_between_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 60)
    stop = threading.Event()
    with Host({"/a.bin": Served(BODY, fail_first=100)}) as host, pytest.raises(Stopped):
        threading.Timer(0.3, stop.set).start()
        fetch(host.url("/a.bin"), tmp_path / "a.bin", report=quiet, rules=Rules(stop=stop))
