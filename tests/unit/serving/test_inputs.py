import base64

import pytest

from lib.errors import UserError
from lib.serving.inputs import describe_inputs, parse_inputs
from tests.sample_predictor import sample_document

IMAGE = "image=https://example.com/a.png"


@pytest.fixture
def document(tmp_path):
    return sample_document(tmp_path)


def test_values_take_the_types_of_the_schema(document):
    pairs = [IMAGE, "steps=7", "scale=7", "loud=True", "seed=-1", "fmt=gif"]
    values = parse_inputs(pairs, document)
    assert values == {
        "image": "https://example.com/a.png",
        "steps": 7,
        "scale": 7.0,
        "loud": True,
        "seed": -1,
        "fmt": "gif",
    }
    assert type(values["scale"]) is float and type(values["steps"]) is int


@pytest.mark.parametrize("text", ["a=b=c", '{"json": 1}', "true", "12", "@someone", '"quoted"', "", " x "])
def test_text_is_kept_as_it_is(document, text):
    assert parse_inputs([IMAGE, f"prompt={text}"], document)["prompt"] == text


def test_an_empty_value_leaves_an_input_out(document):
    assert parse_inputs([IMAGE, "seed=", "steps=", "loud="], document) == {
        "image": "https://example.com/a.png"
    }


def test_a_file_becomes_a_data_uri(document, tmp_path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG")
    uri = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    assert parse_inputs([f"image=@{photo}"], document)["image"] == uri
    values = parse_inputs([IMAGE, f"extras=@{photo}", "extras=https://example.com/b"], document)
    assert values["extras"] == [uri, "https://example.com/b"]


REFUSED = {
    "steps": "write name=value",
    "promt=a": "there is no input 'promt'. Did you mean prompt? Inputs: prompt, image, steps",
    "zzzzz=a": "there is no input 'zzzzz'. Inputs: prompt, image, steps",
    "steps=many": "steps: many is not a whole number",
    "steps=2.5": "steps: 2.5 is not a whole number",
    "steps=501": "steps: 501 is greater than the maximum of 500",
    "steps=0": "steps: 0 is less than the minimum of 1",
    "scale=big": "scale: big is not a number",
    "scale=nan": "scale: nan is less than the minimum of 1",
    "loud=maybe": "loud: maybe is not true or false",
    "fmt=avi": "fmt: 'avi' is not one of mp4, gif",
    "image=photo.png": "image: write @photo.png to send the file",
    "image=@/nowhere/photo.png": "cannot read /nowhere/photo.png: No such file or directory",
}


@pytest.mark.parametrize("pair", REFUSED)
def test_refuses_before_sending(document, pair):
    with pytest.raises(UserError) as caught:
        parse_inputs([IMAGE, pair], document)
    assert REFUSED[pair] in str(caught.value)


def test_refuses_a_missing_input(document):
    with pytest.raises(UserError, match="missing: image"):
        parse_inputs(["prompt=a"], document)


def test_help_lists_type_range_default_and_description(document):
    text = describe_inputs(document)
    assert "image  (@file or URL, required)\n      First frame." in text
    assert "steps  (whole number, 1..500, default 50)" in text
    assert "seed  (whole number, may be empty)" in text
    assert "fmt  (text, mp4 | gif, default mp4)" in text
    assert text.index("prompt") < text.index("image") < text.index("extras")
