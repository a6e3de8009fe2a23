import base64
import json
import os
import subprocess

import pytest

from lib.commands import serve
from lib.commands.common import EXAMPLE_PROMPT
from tests.sample_predictor import sample_document


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t2v", "--port", "99999"], "--port 99999 is out of range: 1 to 65535"),
        (["convert", "--train"], "convert has no training; those that have: i2v, t2v"),
    ],
)
def test_a_wrong_command_line_is_status_2_before_a_server_starts(arguments, message, capsys):
    assert serve.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_printed_request_sends_a_file_that_no_argument_could_hold(tmp_path):
    photo = os.urandom(200_000)
    (tmp_path / "image.png").write_bytes(photo)
    shell = f"curl() {{ cat; }}\n{serve.curl_example('http://127.0.0.1:5000', sample_document(tmp_path))}"
    sent = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, check=True).stdout
    image = "data:image/png;base64," + base64.b64encode(photo).decode()
    assert json.loads(sent) == {"input": {"prompt": EXAMPLE_PROMPT, "image": image}}
