"""Replies that refuse a request repeat little of it."""

import json

from lib.serving.refusals import shortened


def detail(message: str) -> bytes:
    found = {"loc": ["body", "input", "prompt"], "msg": message, "type": "value_error"}
    return json.dumps({"detail": [found]}).encode()


def test_the_middle_of_a_long_message_is_left_out():
    message = f'"{"x" * 50_000}" is longer than 10000 characters'
    (found,) = json.loads(shortened(detail(message)))["detail"]
    assert found["loc"] == ["body", "input", "prompt"] and found["type"] == "value_error"
    assert found["msg"].startswith('"xxxx') and found["msg"].endswith('xxxx" is longer than 10000 characters')
    assert len(found["msg"]) == 405


def test_a_short_message_is_kept():
    reply = detail("9 is greater than the maximum of 5")
    assert json.loads(shortened(reply)) == json.loads(reply)


def test_a_reply_of_another_form_is_cut():
    assert shortened(b"x" * 100_000) == b"x" * 4000
    assert shortened(b'{"detail": "no list"}') == b'{"detail": "no list"}'
