from pathlib import Path

import pytest

from lib.commands import predict
from lib.serving.backend import free_port
from lib.serving.registry import PROJECT
from lib.serving.schema import openapi_schema


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t2v", "-o", "clip.webm", "-i", "output_format=gif"], "does not fit output_format=gif"),
        (["t2v", "-o", "{folder}"], "is a folder; give a file's path"),
        (["t2v", "-o", "none/a.mp4"], "--output none/a.mp4: the folder none does not exist"),
        (["convert", "-i", "dtype=fp8"], "dtype: 'fp8' is not one of auto, float16"),
        (["convert", "-i", "dtyp=auto"], "there is no input 'dtyp'. Did you mean dtype?"),
        (["nothing"], "there is no predictor 'nothing'; there are: caption,"),
    ],
)
def test_a_wrong_command_line_is_status_2_before_a_server_starts(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert predict.main([word.format(folder=tmp_path) for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_status_1(capsys):
    assert predict.main(["t2v", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "no server answers at http://127.0.0.1:" in capsys.readouterr().err


def test_the_ending_of_the_output_chooses_the_format():
    document = openapi_schema(PROJECT / "predict_t2v.py")
    inputs = {}
    predict.match_format(inputs, Path("clip.WEBM"), document)
    assert inputs == {"output_format": "webm"}
    predict.match_format(inputs, Path("clip.dat"), document)
    assert inputs == {"output_format": "webm"}
