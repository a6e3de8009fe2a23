"""Requests for captions are validated."""

import pytest

from lib.caption.request import CaptionSettings
from lib.errors import UserError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": " "}, "prompt is empty; ask something, such as 'Please describe this video in detail.'"),
        ({"prompt": "caf\udce9"}, "prompt is not valid UTF-8"),
        (
            {"frame_sampling": "all"},
            "frame_sampling=all is unknown; allowed are auto, chat, base, uniform",
        ),
        ({"template": "poem"}, "template=poem is unknown; allowed are auto, chat, base, vqa"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range: 1 to 2048"),
        ({"max_new_tokens": 2049}, "max_new_tokens=2049 is out of range: 1 to 2048"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range: 0 to 5"),
        ({"temperature": float("nan")}, "temperature=nan is out of range: 0 to 5"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range: 0.01 to 1"),
        ({"seed": -1}, "seed=-1 is out of range: 0 to 9223372036854775807"),
    ],
)
def test_invalid_settings_are_refused_with_the_allowed_values(given, message):
    with pytest.raises(UserError) as caught:
        CaptionSettings(**given)
    assert str(caught.value) == message
