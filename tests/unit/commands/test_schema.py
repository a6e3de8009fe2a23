import json

import pytest

from lib.commands import schema
from lib.serving.registry import predictors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no predictor 'nothing'; there are: caption,"),
        (["--all"], "--all writes every document: give --output FOLDER and no name"),
        (["t2v", "--all", "-o", "x"], "--all writes every document: give --output FOLDER and no name"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments, message, capsys):
    assert schema.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_name_all_names_are_listed(capsys):
    assert schema.main([]) == 0
    assert capsys.readouterr().out.split() == list(predictors())


def test_a_document_is_printed_or_written(tmp_path, capsys):
    assert schema.main(["t2v"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert schema.main(["t2v", "--output", str(tmp_path / "t2v.json")]) == 0
    assert json.loads((tmp_path / "t2v.json").read_text()) == printed == predictors()["t2v"].openapi()


def test_writing_all_documents_names_what_callers_lose(tmp_path, capsys):
    assert schema.main(["--all", "--output", str(tmp_path)]) == 0
    assert sorted(path.stem for path in tmp_path.iterdir()) == list(predictors())
    assert capsys.readouterr().err == ""
    before = predictors()["t2v"].openapi()
    before["components"]["schemas"]["Input"]["properties"]["duration"] = {"type": "number"}
    (tmp_path / "t2v.json").write_text(json.dumps(before))
    assert schema.main(["--all", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().err == "t2v: Input duration is gone\n"
    assert json.loads((tmp_path / "t2v.json").read_text()) == predictors()["t2v"].openapi()
