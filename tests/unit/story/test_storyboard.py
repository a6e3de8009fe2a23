"""A storyboard keeps what people wrote, and names what cannot be read."""

import json

import pytest

from lib.errors import UserError
from lib.story.storyboard import Scene, Storyboard, parse_storyboard

SCENE = {"title": "Storm", "prompt": "waves break", "image_prompt": "a lighthouse"}


def written(**changes) -> bytes:
    return json.dumps(
        {"version": 1, "idea": "a lighthouse", "seed": 7, "scenes": [SCENE], **changes}
    ).encode()


def scene(**changes) -> bytes:
    return written(scenes=[SCENE, {**SCENE, **changes}])


def test_a_storyboard_comes_back_as_it_was_written():
    board = Storyboard(idea="Leuchtturm \u2603", seed=7, scenes=(Scene(**SCENE), Scene(**SCENE)))
    assert parse_storyboard(board.to_json().encode()) == board


def test_what_can_be_left_out():
    board = parse_storyboard(json.dumps({"scenes": [{"prompt": "waves", "image_prompt": "sea"}]}).encode())
    assert board == Storyboard(idea="", scenes=(Scene(title="waves", prompt="waves", image_prompt="sea"),))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<b>waves</b> <script>break</script>", "waves break"),
        ("waves\n\tbreak\x00\u2028", "waves break"),
        ("waves \ud800break", "waves break"),
        ("3 < 4 and 5 > 2, ../../etc/passwd", "3 < 4 and 5 > 2, ../../etc/passwd"),
    ],
)
def test_texts_become_one_line_without_tags(text, kept):
    assert parse_storyboard(scene(prompt=text)).scenes[1].prompt == kept


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (written(scenes=[SCENE] * 9), "storyboard has 9 scenes; 1 to 8 are allowed."),
        (written(scenes=[]), "storyboard has 0 scenes; 1 to 8 are allowed."),
        (written(scenes="x"), "storyboard has no list of scenes; 1 to 8 are allowed."),
        (written(version=2), "storyboard has version 2; this service reads version 1."),
        (written(version=True), "storyboard has version True; this service reads version 1."),
        (
            written(path="/etc"),
            "storyboard has the unknown key 'path'; known are version, idea, seed, scenes.",
        ),
        (written(seed=-1), "storyboard has the seed -1; it has to be a whole number from 0."),
        (written(seed=1.5), "storyboard has the seed 1.5; it has to be a whole number from 0."),
        (written(idea=["x"]), "storyboard: idea has to be a text of at most 10,000 characters."),
        (scene(prompt=3), "storyboard, scene 2: prompt is 3; it has to be a text."),
        (scene(prompt=" <br> "), "storyboard, scene 2 has no prompt; write what the clip shows."),
        (
            scene(image_prompt=""),
            "storyboard, scene 2 has no image_prompt; write what the first frame shows.",
        ),
        (
            scene(prompt="x" * 20_000),
            "storyboard, scene 2: prompt has 20,000 characters; at most 10,000 are allowed.",
        ),
        (
            scene(file="a.png"),
            "storyboard, scene 2 has the unknown key 'file'; known are title, prompt, image_prompt.",
        ),
        (b"x" * (2 << 20), "storyboard has more than 1,048,576 bytes."),
        (b'{"scenes": [', "storyboard is not a JSON file in UTF-8, line 1: Expecting value."),
        (b"<html></html>", "storyboard is not a JSON file in UTF-8, line 1: Expecting value."),
        (b"\xff\xfe\x00", "storyboard is not a JSON file in UTF-8."),
        (b"[" * 100_000, "storyboard is not a JSON file in UTF-8."),
        (b"[]", "storyboard is not a JSON object with version, idea, seed, scenes."),
    ],
)
def test_what_cannot_be_read_is_named(data, message):
    with pytest.raises(UserError) as caught:
        parse_storyboard(data)
    assert str(caught.value) == message
