import contextlib
import http.client
import socket
import threading
import time

import pytest

from lib.errors import UserError
from lib.network import urls
from lib.network.http import DeadlineError
from lib.network.urls import check_address, open_url
from tests.http_host import Host, Served


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
def test_what_is_no_web_address_is_refused_even_locally(local, url):
    with pytest.raises(UserError, match="is not an address this service fetches"):
        check_address(url)


def test_unencrypted_addresses_need_local_sources(strict, monkeypatch):
    resolve_to(monkeypatch, "93.184.215.14")
    with pytest.raises(UserError, match="not encrypted"):
        check_address("http://pictures.example/a.png")
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    check_address("http://pictures.example/a.png")


def test_an_unknown_host_is_said_to_be_unknown(strict, monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="cannot be found"):
        check_address("https://nowhere.example/a.png")


@pytest.mark.parametrize("url", ["https://user:word@pictures.example/", "https://pict%75res.example/"])
def test_a_host_that_could_be_read_in_two_ways_is_refused(strict, url):
    with pytest.raises(UserError, match="not a plain name"):
        check_address(url)


def test_a_name_that_cannot_be_one_is_said_to_be_unknown(strict):
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
        open_url(host.url("/gone?token=SECRET"))
    assert "SECRET" not in str(caught.value)


def test_local_sources_are_read_through_redirects(local):
    files = {
        "/picture": Served(b"pixels"),
        "/moved": Served(b"", status=302, headers={"Location": "/picture"}),
    }
    with Host(files) as host:
        assert open_url(host.url("/moved")).read() == b"pixels"


class PublicSocket(socket.socket):
    """A socket that believes to be connected to a public address."""

    def getpeername(self):
        return ("93.184.215.14", 443)


def connect_to(monkeypatch, host: Host, kind: type[socket.socket]) -> None:
    """Let every https connection end at a host on this machine, without encryption."""

    def connect(connection: http.client.HTTPSConnection) -> None:
        connection.sock = kind()
        connection.sock.connect(("127.0.0.1", int(host.address.rpartition(":")[2])))

    monkeypatch.setattr(http.client.HTTPSConnection, "connect", connect)
    monkeypatch.setattr("urllib.request.getproxies", dict)


def resolve_literally(monkeypatch) -> None:
    """Answer as a resolver does: an IP address is itself, any name is public."""

    def resolve(host: str, port: int, **options: object) -> list:
        address = "93.184.215.14" if host.endswith(".example") else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_a_public_address_is_read(strict, monkeypatch):
    resolve_literally(monkeypatch)
    with Host({"/a.png": Served(b"pixels")}) as host:
        connect_to(monkeypatch, host, PublicSocket)
        assert open_url("https://pictures.example/a.png").read() == b"pixels"


@pytest.mark.parametrize("goal", ["https://10.0.0.1/", "https://[::1]/", "https://127.0.0.1/a.png"])
def test_a_redirect_to_a_private_address_is_not_followed(strict, monkeypatch, goal):
    resolve_literally(monkeypatch)
    with Host({"/moved": Served(b"", status=302, headers={"Location": goal})}) as host:
        connect_to(monkeypatch, host, PublicSocket)
        with pytest.raises(UserError, match="private address"):
            open_url("https://pictures.example/moved")
        assert [path for path, _, _ in host.requests] == ["/moved"]


def test_a_redirect_away_from_encryption_is_not_followed(strict, monkeypatch):
    resolve_literally(monkeypatch)
    moved = Served(b"", status=302, headers={"Location": "http://pictures.example/a.png"})
    with Host({"/moved": moved, "/a.png": Served(b"pixels")}) as host:
        connect_to(monkeypatch, host, PublicSocket)
        with pytest.raises(UserError, match="not to https"):
            open_url("https://pictures.example/moved")
        assert len(host.requests) == 1


def test_a_name_that_leads_inside_once_it_was_checked_is_not_asked(strict, monkeypatch):
    resolve_literally(monkeypatch)
    with Host({"/a.png": Served(b"keys")}) as host:
        connect_to(monkeypatch, host, socket.socket)
        with pytest.raises(UserError, match=r"private address 127\.0\.0\.1"):
            open_url("https://pictures.example/a.png")
        assert host.requests == []


def test_a_redirect_to_a_file_is_not_followed(local, tmp_path):
    (tmp_path / "secret").write_text("keys")
    moved = Served(b"", status=302, headers={"Location": (tmp_path / "secret").as_uri()})
    with Host({"/moved": moved}) as host, pytest.raises(UserError, match="redirects lead nowhere"):
        open_url(host.url("/moved"))


def test_a_body_that_trickles_in_is_given_up(local, monkeypatch):
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.4)
    with Host({"/slow": Served(bytes(1000), piece=1, pause=0.02)}) as host:
        response = open_url(host.url("/slow"))
        with pytest.raises(DeadlineError, match="too slow"):
            response.read(1000)


def test_headers_that_trickle_in_are_given_up(local, monkeypatch):
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=trickle_headers, args=(server,), daemon=True)
        thread.start()
        with pytest.raises(UserError, match="too slow"):
            open_url(f"http://127.0.0.1:{server.getsockname()[1]}/")
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
            open_url(host.url("/loop"))
        assert len(host.requests) <= 6
        with pytest.raises(UserError, match=r"nothing at this address \(HTTP 404\)"):
            open_url(host.url("/gone"))
    with pytest.raises(UserError, match="refuses the connection"):
        open_url(host.url("/picture"))
