import json

import pytest

from lib.batch.rows import read_rows
from lib.errors import UserError
from lib.serving.registry import PROJECT
from lib.serving.schema import input_document


@pytest.fixture(scope="module")
def t2v():
    return input_document(PROJECT / "predict_t2v.py", name="Runner")


@pytest.fixture(scope="module")
def i2v():
    return input_document(PROJECT / "predict_i2v.py", name="Runner")


def test_a_text_file_has_a_prompt_on_each_line(tmp_path, t2v):
    (tmp_path / "list.txt").write_text("a cat\n\n  a dog \n")
    rows = read_rows(tmp_path / "list.txt", common=["seed=7"], document=t2v)
    assert [(row.number, row.name, row.given) for row in rows] == [
        (1, "00001.mp4", {"seed": 7, "prompt": "a cat"}),
        (2, "00002.mp4", {"seed": 7, "prompt": "a dog"}),
    ]
    assert rows[0].inputs["num_inference_steps"] == 50
    assert rows[0].inputs["width"] is None


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c"])
def test_only_line_ends_end_a_prompt(tmp_path, t2v, separator):
    prompts = [f"a cat{separator}asleep", "a dog", "a fox"]
    (tmp_path / "list.txt").write_bytes(f"{prompts[0]}\n{prompts[1]}\r\n{prompts[2]}\r".encode())
    rows = read_rows(tmp_path / "list.txt", common=[], document=t2v)
    assert [row.inputs["prompt"] for row in rows] == prompts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text",
    [
        'prompt, seed\n"a cat, asleep", 7\n a dog,\n',
        'sep=;\r\nprompt;seed\r\n"a cat, asleep";7\r\na dog;\r\n',
        "prompt\tseed\ra cat, asleep\t7\ra dog\t\r",
    ],
)
def test_tables_are_read_as_spreadsheets_write_them(tmp_path, t2v, encoding, text):
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    rows = read_rows(tmp_path / "list.csv", common=[], document=t2v)
    assert [row.given for row in rows] == [{"prompt": "a cat, asleep", "seed": 7}, {"prompt": "a dog"}]


def test_a_table_has_a_column_for_each_input_and_overrides_the_command_line(tmp_path, t2v):
    (tmp_path / "list.csv").write_text('prompt,seed,output_format\n"a cat, asleep",,webm\na dog,9,\n')
    rows = read_rows(tmp_path / "list.csv", common=["seed=7"], document=t2v)
    assert [row.given for row in rows] == [
        {"seed": 7, "prompt": "a cat, asleep", "output_format": "webm"},
        {"seed": 9, "prompt": "a dog"},
    ]
    assert rows[0].name == "00001.webm"


def test_lines_of_json_keep_their_types(tmp_path, t2v):
    lines = [{"prompt": "7", "seed": 7, "use_dynamic_cfg": True, "width": None}, {"guidance_scale": 1.5}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = read_rows(tmp_path / "list.jsonl", common=[], document=t2v)
    assert first.given == {"prompt": "7", "seed": 7, "use_dynamic_cfg": True}
    assert second.given == {"guidance_scale": 1.5}


def test_paths_in_a_list_are_relative_to_its_folder(tmp_path, i2v):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"png")
    (tmp_path / "list.csv").write_text("image,prompt\nphotos/cat.png,a cat\n")
    (row,) = read_rows(tmp_path / "list.csv", common=[], document=i2v)
    assert row.inputs["image"] == str(tmp_path / "photos" / "cat.png")


def test_a_rows_fingerprint_changes_with_its_inputs_and_the_model(tmp_path, t2v):
    (tmp_path / "list.txt").write_text("a cat\n")
    (row,) = read_rows(tmp_path / "list.txt", common=[], document=t2v)
    (again,) = read_rows(tmp_path / "list.txt", common=[], document=t2v)
    (other,) = read_rows(tmp_path / "list.txt", common=["seed=7"], document=t2v)
    assert row.fingerprint("m") == again.fingerprint("m")
    assert len({row.fingerprint("m"), row.fingerprint("n"), other.fingerprint("m")}) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.csv", "promt\na cat\n", "list.csv, row 1: there is no input 'promt'. Did you mean prompt?"),
        ("list.csv", "prompt,seed\na cat,x\n", "list.csv, row 1: seed: x is not a whole number"),
        (
            "list.csv",
            "prompt\na cat, asleep\n",
            "list.csv, line 2: the row has 2 fields and the table 1 columns",
        ),
        ("list.jsonl", '{"prompt": "a"}\n[1]\n', "list.jsonl, line 2: the line is not a JSON object."),
        ("list.jsonl", "{\n", "list.jsonl, line 1: the line is not JSON ("),
        ("list.csv", 'prompt\na\n"b, c\n', "list.csv, line 3: the table cannot be read from here on"),
        ("list.txt", "\n\n", "contains no prompts."),
        ("list.json", "[]", "is not a supported list: use .txt, .csv, .jsonl."),
    ],
)
def test_an_invalid_list_is_refused_with_the_row(tmp_path, t2v, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as refused:
        read_rows(tmp_path / name, common=[], document=t2v)
    assert message in str(refused.value)


def test_a_missing_image_is_reported_with_its_row(tmp_path, i2v):
    (tmp_path / "list.csv").write_text("image,prompt\nnone.png,a cat\n")
    with pytest.raises(UserError, match=r"list.csv, row 1: image: there is no file none.png\."):
        read_rows(tmp_path / "list.csv", common=[], document=i2v)
