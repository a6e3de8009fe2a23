import json

import pytest

from lib.errors import UserError
from lib.serving.backend import free_port
from lib.serving.client import _message, _plain_error, fetch_schema, health


def test_the_servers_errors_are_shown_without_its_prefixes():
    detail = {
        "loc": ["body", "input", "num_inference_steps"],
        "msg": "501 is greater than the maximum of 500",
    }
    body = json.dumps({"detail": [detail]}).encode()
    assert _message(body) == "num_inference_steps: 501 is greater than the maximum of 500"
    assert _message(b'{"error":"At capacity - all prediction slots busy","status":"failed"}').startswith(
        "At cap"
    )
    assert _message(b"Failed to parse") == "Failed to parse"
    assert (
        _plain_error("Prediction failed: Prediction failed: UserError: width 7: use 720")
        == "width 7: use 720"
    )
    assert _plain_error("Prediction failed: FetchError: nothing at a: b") == "nothing at a: b"
    assert _plain_error("Prediction failed: ValueError: boom") == "ValueError: boom"


@pytest.mark.parametrize("url", ["localhost:5000", "ftp://localhost", "http://", "http://host:port"])
def test_what_is_not_an_http_address_is_refused(url):
    with pytest.raises(UserError, match="write http://host:port"):
        fetch_schema(url)


def test_health_is_empty_where_no_server_answers():
    assert health(f"http://127.0.0.1:{free_port()}") == {}
