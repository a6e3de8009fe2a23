"""Who may call a local server: by the Host, the Origin and the token of a request."""

import asyncio

import httpx2
import pytest
from starlette.responses import PlainTextResponse

from lib.errors import UserError
from lib.serving.access import Access, check_token_for
from lib.settings import current


def status(headers: dict[str, str], *, method: str = "POST", **options) -> int:
    """Send a request with these headers through Access and return the status: 200 if it was passed on."""
    app = Access(PlainTextResponse("passed"), **({"host": "127.0.0.1", "token": ""} | options))

    async def send() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:5000") as client:
            return await client.request(method, "/predictions", headers=headers)

    return asyncio.run(send()).status_code


@pytest.mark.parametrize(
    "host", ["127.0.0.1:5000", "127.0.0.1", "localhost:8080", "LOCALHOST", "[::1]:5000", "[::1]", "127.9.9.9"]
)
def test_names_of_this_machine_are_accepted_with_any_port(host):
    assert status({"Host": host}) == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "example.com",
        "example.com:5000",
        "127.0.0.1.example.com",
        "localhost.example.com",
        "127.0.0.1@example.com",
        "10.0.0.5",
        "0.0.0.0",
        "2130706433",
    ],
)
def test_another_host_name_is_refused_because_dns_can_point_it_here(host):
    assert status({"Host": host}) == 421


def test_a_server_for_other_machines_is_reached_by_address_and_by_listed_names():
    options = {"host": "0.0.0.0", "token": "s", "names": frozenset({"gpu.example.com"})}
    token = {"Authorization": "Bearer s"}
    assert status({"Host": "192.0.2.7:5000", **token}, **options) == 200
    assert status({"Host": "GPU.example.com", **token}, **options) == 200
    assert status({"Host": "other.example.com", **token}, **options) == 421


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.com"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:5001"},
        {"Origin": "http://127.0.0.1:5000.example.com"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_sites_are_refused(headers, method):
    assert status({"Host": "127.0.0.1:5000", **headers}, method=method) == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://127.0.0.1:5000", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://127.0.0.1:5000"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_pages_of_this_server_and_addresses_typed_in_are_accepted(headers):
    assert status({"Host": "127.0.0.1:5000", **headers}) == 200


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer wrong", "Basic secret", "secret", "Bearer secrets", "Bearer secre"],
)
def test_a_request_without_the_token_is_401(authorization):
    headers = {"Authorization": authorization} if authorization else {}
    assert status(headers, token="secret") == 401


def test_the_token_is_accepted_whatever_the_case_of_its_scheme():
    assert status({"Authorization": "Bearer secret"}, token="secret") == 200
    assert status({"Authorization": "bearer secret"}, token="secret") == 200


def test_a_host_that_others_reach_needs_a_token():
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0 lets other machines in: set COGVIDEOX_API_TOKEN"):
        check_token_for("0.0.0.0", "")
    check_token_for("0.0.0.0", "secret")
    for host in ("127.0.0.1", "localhost", "::1", "127.3.4.5"):
        check_token_for(host, "")
    for host in ("192.0.2.7", "::", "gpu.example.com"):
        with pytest.raises(UserError, match="COGVIDEOX_API_TOKEN"):
            check_token_for(host, "")


def test_a_token_that_no_header_can_hold_is_refused_without_showing_it():
    for token in ("two words", "café", "a\nb"):
        with pytest.raises(UserError) as refused:
            current({"COGVIDEOX_API_TOKEN": token})
        assert "COGVIDEOX_API_TOKEN has characters" in str(refused.value)
        assert token not in str(refused.value)
    assert current({"COGVIDEOX_API_TOKEN": " abc-._~+/= "}).api_token == "abc-._~+/="
