import contextlib
import socket
import threading
import time

import httpcore2
import pytest

from lib.errors import UserError
from lib.network import http, urls
from lib.network.http import Source, read
from lib.network.transport import Rules
from lib.network.urls import check_address, request_rules
from tests.http_host import Host, Served


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)


def fetched(url: str) -> bytes:
    """Read what a request names."""
    return read(Source(url=url, max_bytes=10_000, rules=request_rules()))


def resolve_to(monkeypatch, *addresses: str) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: answers)


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.delenv("COGVIDEOX_LOCAL_SOURCES", raising=False)


@pytest.fixture
def local(monkeypatch):
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.5.4", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("::", "::1", "fd00::1", "fe80::1%eth0", "fec0::1", "224.0.0.1", "239.1.2.3", "ff02::1", "ff0e::1"),
        *("::ffff:10.0.0.1", "2002:7f00:1::", "2002:a00:1::1", "64:ff9b::10.0.0.1", "64:ff9b:1::1"),
        *("::127.0.0.1", "::10.0.0.1", "240.0.0.1", "2001:db8::1"),
        *("168.63.129.16", "192.0.0.8", "192.0.0.171", "192.88.99.1", "2001:0:1::1", "::ffff:168.63.129.16"),
    ],
)
def test_a_host_with_any_private_address_is_refused(strict, monkeypatch, address):
    resolve_to(monkeypatch, "93.184.215.14", address)
    with pytest.raises(UserError, match="private address"):
        check_address("https://pictures.example/a.png")


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:21f::1", "64:ff9b::5db8:d70e", "2002:5db8:d70e::1"]
)
def test_a_public_https_address_is_accepted(strict, monkeypatch, address):
    resolve_to(monkeypatch, address)
    check_address("https://pictures.example/a.png")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://x/y",
        "/etc/passwd",
        "https://",
        "gopher://h",
        "https://[::1",
        "https://host:99999/",
    ],
)
def test_anything_but_a_web_address_is_refused_even_locally(local, url):
    with pytest.raises(UserError, match="is not an address this service fetches"):
        check_address(url)


def test_unencrypted_addresses_need_local_sources(strict, monkeypatch):
    resolve_to(monkeypatch, "93.184.215.14")
    with pytest.raises(UserError, match="not encrypted"):
        check_address("http://pictures.example/a.png")
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    check_address("http://pictures.example/a.png")


def test_an_unknown_host_is_reported(strict, monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="cannot be found"):
        check_address("https://nowhere.example/a.png")


@pytest.mark.parametrize("url", ["https://user:word@pictures.example/", "https://pict%75res.example/"])
def test_a_host_that_can_be_parsed_in_two_ways_is_refused(strict, url):
    with pytest.raises(UserError, match="not a plain name"):
        check_address(url)


def test_an_impossible_host_name_is_reported_as_unknown(strict):
    with pytest.raises(UserError, match="cannot be found"):
        check_address(f"https://{'a' * 80}.example/")


@pytest.mark.parametrize("start", ["ftp://{}", "http://{}", "https://{}", "https://{}:99999", "https://[{}"])
def test_a_refusal_does_not_repeat_what_may_be_a_secret(strict, monkeypatch, start):
    resolve_to(monkeypatch, "10.0.0.1")
    for host in ("user:SECRET@pictures.example", "pictures.example"):
        with pytest.raises(UserError) as caught:
            check_address(f"{start.format(host)}/a.png?token=SECRET")
        assert "SECRET" not in str(caught.value)


def test_a_failure_does_not_repeat_what_may_be_a_secret(local):
    with Host({}) as host, pytest.raises(UserError, match="404") as caught:
        fetched(host.url("/gone?token=SECRET"))
    assert "SECRET" not in str(caught.value)


def test_local_sources_are_read_through_redirects(local):
    files = {
        "/picture": Served(b"pixels"),
        "/moved": Served(b"", status=302, headers={"Location": "/picture"}),
    }
    with Host(files) as host:
        assert fetched(host.url("/moved")) == b"pixels"


def connect_to(monkeypatch, host: Host, peer: str = "93.184.215.14") -> None:
    """Let every connection lead to a host on this machine, without TLS, as if its address was `peer`."""
    connect = httpcore2.SyncBackend.connect_tcp

    def connect_tcp(backend, name: str, port: int, *options: object) -> httpcore2.NetworkStream:
        stream = connect(backend, "127.0.0.1", int(host.address.rpartition(":")[2]), *options)
        stream.get_extra_info = {"server_addr": (peer, 443), "socket": stream.get_extra_info("socket")}.get
        stream.start_tls = lambda *_: stream
        return stream

    monkeypatch.setattr(httpcore2.SyncBackend, "connect_tcp", connect_tcp)
    monkeypatch.setattr("urllib.request.getproxies", dict)


def resolve_literally(monkeypatch) -> None:
    """Answer as a resolver does: an IP address is itself, any name is public."""

    def resolve(host: str, port: int, *_: object, **options: object) -> list:
        address = "93.184.215.14" if host.endswith(".example") else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_a_public_address_is_read(strict, monkeypatch):
    resolve_literally(monkeypatch)
    with Host({"/a.png": Served(b"pixels")}) as host:
        connect_to(monkeypatch, host)
        assert fetched("https://pictures.example/a.png") == b"pixels"


@pytest.mark.parametrize("goal", ["https://10.0.0.1/", "https://[::1]/", "https://127.0.0.1/a.png"])
def test_a_redirect_to_a_private_address_is_not_followed(strict, monkeypatch, goal):
    resolve_literally(monkeypatch)
    with Host({"/moved": Served(b"", status=302, headers={"Location": goal})}) as host:
        connect_to(monkeypatch, host)
        with pytest.raises(UserError, match="private address"):
            fetched("https://pictures.example/moved")
        assert [path for path, _, _ in host.requests] == ["/moved"]


def test_a_redirect_away_from_encryption_is_not_followed(strict, monkeypatch):
    resolve_literally(monkeypatch)
    moved = Served(b"", status=302, headers={"Location": "http://pictures.example/a.png"})
    with Host({"/moved": moved, "/a.png": Served(b"pixels")}) as host:
        connect_to(monkeypatch, host)
        with pytest.raises(UserError, match="not to https"):
            fetched("https://pictures.example/moved")
        assert len(host.requests) == 1


def test_a_name_that_leads_to_a_private_address_after_the_check_is_not_requested(strict, monkeypatch):
    resolve_literally(monkeypatch)
    with Host({"/a.png": Served(b"keys")}) as host:
        connect_to(monkeypatch, host, "127.0.0.1")
        with pytest.raises(UserError, match=r"private address 127\.0\.0\.1"):
            fetched("https://pictures.example/a.png")
        assert host.requests == []


def test_nothing_is_sent_to_a_refused_peer_not_even_for_tls(strict, monkeypatch):
    resolve_literally(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = httpcore2.SyncBackend.connect_tcp
        port = server.getsockname()[1]
        monkeypatch.setattr(
            httpcore2.SyncBackend,
            "connect_tcp",
            lambda backend, name, _, *options: connect(backend, "127.0.0.1", port, *options),
        )
        with pytest.raises(UserError, match=r"private address 127\.0\.0\.1"):
            fetched("https://pictures.example/a.png")
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1000) == b""


def test_a_proxy_of_the_environment_is_used_and_is_not_checked_as_a_peer(monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    with Host({"/a.png": Served(b"pixels")}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        rules = Rules(check_peer=lambda *_: pytest.fail("the proxy was checked"))
        assert read(Source(url="http://pictures.example/a.png", rules=rules)) == b"pixels"
        assert proxy.requests[0][2]["Host"] == "pictures.example"


def test_no_proxy_can_name_a_host_with_its_port(monkeypatch):
    with Host({"/a.png": Served(b"pixels")}) as host, Host({}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        monkeypatch.setenv("no_proxy", host.address.removeprefix("http://"))
        assert read(Source(url=host.url("/a.png"))) == b"pixels"
        assert proxy.requests == []


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "ftp://127.0.0.1", "http://", "a:99999"])
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch, proxy):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(UserError, match="http_proxy is not the address of an http or https proxy"):
        read(Source(url="http://pictures.example/a.png"))


def test_the_operators_hub_is_trusted_however_its_address_is_spelled(strict):
    with Host({"/a.json": Served(b"{}")}) as host:
        hub = host.address.replace("127.0.0.1", "LOCALHOST")
        assert read(Source(url=f"{hub}/a.json", rules=request_rules(trusted=hub))) == b"{}"
        with pytest.raises(UserError, match="not encrypted"):
            read(Source(url=f"{hub}/api/../a.json", rules=request_rules(trusted=f"{hub}/api")))


def test_a_redirect_to_a_malformed_address_is_reported(local):
    moved = Served(b"", status=302, headers={"Location": "https://[bad/"})
    with Host({"/moved": moved}) as host, pytest.raises(UserError, match="redirects to a malformed address"):
        fetched(host.url("/moved"))


def test_a_compressed_body_is_refused_as_it_may_unpack_to_any_size(local, tmp_path):
    with Host({"/a": Served(b"x" * 100, headers={"Content-Encoding": "gzip"})}) as host:
        for target in (None, tmp_path / "a"):
            source = http.Source(url=host.url("/a"))
            with pytest.raises(
                UserError, match=r"the host compresses it \(gzip\), although it was asked not"
            ):
                http.read(source) if target is None else http.save(source, target)
    assert list(tmp_path.iterdir()) == []


def test_messages_cut_a_long_address(local):
    with Host({}) as host, pytest.raises(UserError) as refused:
        http.read(http.Source(url=host.url(f"/{'a' * 3000}")))
    assert len(str(refused.value)) < 350


def test_a_silent_host_is_given_up_after_the_timeout_also_where_a_stop_is_awaited(monkeypatch):
    monkeypatch.setattr(http, "ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        started = time.monotonic()
        with pytest.raises(UserError, match="the host sent nothing for 1 s"):
            read(Source(url=url, timeout=1, rules=Rules(stop=threading.Event())))
        assert time.monotonic() - started < 1.8


def test_a_redirect_to_a_file_is_not_followed(local, tmp_path):
    (tmp_path / "secret").write_text("keys")
    moved = Served(b"", status=302, headers={"Location": (tmp_path / "secret").as_uri()})
    with Host({"/moved": moved}) as host, pytest.raises(UserError, match="not to https"):
        fetched(host.url("/moved"))


def test_a_body_that_trickles_in_is_aborted(local, monkeypatch):
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.4)
    with Host({"/slow": Served(bytes(1000), piece=1, pause=0.02)}) as host:
        with pytest.raises(UserError, match="too slow"):
            fetched(host.url("/slow"))
        assert len(host.requests) == 1


def test_headers_that_trickle_in_are_aborted(local, monkeypatch):
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=trickle_headers, args=(server,), daemon=True)
        thread.start()
        with pytest.raises(UserError, match="too slow"):
            fetched(f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join(10)
        assert not thread.is_alive()


def trickle_headers(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection, contextlib.suppress(OSError):  # ends when the client hangs up
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
        for _ in range(200):
            connection.sendall(b"a")
            time.sleep(0.02)


def test_endless_redirects_and_refusals_are_clear(local):
    files = {
        "/loop": Served(b"", status=302, headers={"Location": "/loop"}),
        "/gone": Served(b"", status=404),
    }
    with Host(files) as host:
        with pytest.raises(UserError, match="redirects lead nowhere"):
            fetched(host.url("/loop"))
        assert len(host.requests) <= 6
        with pytest.raises(UserError, match=r"nothing at this address \(HTTP 404\)"):
            fetched(host.url("/gone"))
    with pytest.raises(UserError, match="refuses the connection"):
        fetched(host.url("/picture"))
