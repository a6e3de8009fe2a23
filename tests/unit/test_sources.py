import socket

import pytest

from lib.errors import UserError
from lib.sources import check_address, open_url
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
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.5.4", "169.254.169.254", "0.0.0.0", "::1", "fd00::1"],
)
def test_a_host_with_any_private_address_is_refused(strict, monkeypatch, address):
    resolve_to(monkeypatch, "93.184.215.14", address)
    with pytest.raises(UserError, match="private address"):
        check_address("https://pictures.example/a.png")


def test_a_public_https_address_is_accepted(strict, monkeypatch):
    resolve_to(monkeypatch, "93.184.215.14")
    check_address("https://pictures.example/a.png")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "/etc/passwd", "https://", "gopher://h"])
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


def test_local_sources_are_read_through_redirects(local):
    files = {
        "/picture": Served(b"pixels"),
        "/moved": Served(b"", status=302, headers={"Location": "/picture"}),
    }
    with Host(files) as host:
        assert open_url(host.url("/moved")).raw.read() == b"pixels"


def test_a_redirect_to_a_private_address_is_not_followed(local, monkeypatch):
    with Host({"/secret": Served(b"keys")}) as inside:
        moved = Served(b"", status=302, headers={"Location": inside.url("/secret").replace("http:", "file:")})
        with Host({"/moved": moved}) as outside, pytest.raises(UserError, match="not an address"):
            open_url(outside.url("/moved"))
        assert inside.requests == []


def test_endless_redirects_and_refusals_are_clear(local):
    files = {
        "/loop": Served(b"", status=302, headers={"Location": "/loop"}),
        "/gone": Served(b"", status=404),
    }
    with Host(files) as host:
        with pytest.raises(UserError, match="redirects more than 5 times"):
            open_url(host.url("/loop"))
        with pytest.raises(UserError, match="the host answers 404"):
            open_url(host.url("/gone"))
    with pytest.raises(UserError, match="cannot be fetched"):
        open_url(host.url("/picture"))
