"""A local server behaves like the image: every row of Cog's reply table, on a predictor without a model."""

import base64
import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.serving.backend import ServerError, free_port
from lib.serving.client import (
    Canceled,
    PredictionError,
    fetch_schema,
    health,
    predict,
    request,
)
from lib.serving.registry import PROJECT
from lib.serving.server import Server
from tests.integration.conftest import SAMPLE, sample_config, start_slowly, wait_for
from tests.serving import wait_until_idle


@pytest.fixture
def url(serve, sample) -> str:
    """The sample's server, idle: coglet frees its slot a moment after it has replied."""
    server = serve(sample)
    wait_until_idle(server.url)
    return server.url


def post(url: str, inputs: dict) -> tuple[int, dict]:
    status, body = request(url, "POST", "/predictions", {"input": inputs})
    return status, json.loads(body)


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]))


REFUSED = {
    "out of range": ({"text": "a", "steps": 501}, "steps", "501 is greater than the maximum of 500"),
    "below range": ({"text": "a", "scale": 0.5}, "scale", "0.5 is less than the minimum of 1"),
    "wrong type": ({"text": "a", "steps": "many"}, "steps", '"many" is not of type "integer"'),
    "bad choice": ({"text": "a", "ending": "avi"}, "ending", '"avi" is not one of'),
    "missing": ({}, "text", "Field required"),
    "explicit null": ({"text": "a", "seed": None}, "seed", 'null is not of type "integer"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_input_is_422_naming_it(url, case):
    inputs, name, message = REFUSED[case]
    status, reply = post(url, inputs)
    assert status == 422
    assert reply["detail"][0]["loc"] == ["body", "input", name]
    assert message in reply["detail"][0]["msg"]


def test_an_unknown_input_is_dropped_by_the_server(url):
    status, reply = post(url, {"text": "a", "colour": "red"})
    assert (status, reply["status"]) == (200, "succeeded")


def test_malformed_json_is_400(url):
    connection = connect(url)
    connection.request("POST", "/predictions", "{bad", {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 400
    assert b"JSON" in reply.read()


def test_an_exception_is_a_failed_prediction_and_the_server_stays_ready(url):
    status, reply = post(url, {"text": "a", "fail": True})
    assert (status, reply["status"]) == (200, "failed")
    assert "ValueError: boom" in reply["error"]
    wait_until_idle(url, seconds=10)


def test_busy_asynchronous_poll_and_cancel(url):
    thread = start_slowly(url, "busy1")
    try:
        status, reply = post(url, {"text": "b"})
        assert status == 409 and "At capacity" in reply["error"]
        status, body = request(url, "PUT", "/predictions/busy1", {"input": {"text": "ignored"}})
        assert status == 202 and json.loads(body)["status"] == "processing"
        assert request(url, "GET", "/predictions/busy1")[0] == 405
        assert request(url, "POST", "/predictions/nobody/cancel")[0] == 404
    finally:
        assert request(url, "POST", "/predictions/busy1/cancel")[0] == 200
        thread.join()
    wait_until_idle(url)
    assert post(url, {"text": "after"})[1]["status"] == "succeeded"


def test_asynchronous_requests_are_202(url):
    connection = connect(url)
    headers = {"Content-Type": "application/json", "Prefer": "respond-async"}
    connection.request("POST", "/predictions", '{"input": {"text": "a"}}', headers)
    reply = connection.getresponse()
    assert reply.status == 202
    assert json.loads(reply.read())["status"] == "starting"
    wait_until_idle(url)


def test_server_sent_events_are_406(url):
    connection = connect(url)
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    connection.request("POST", "/predictions", '{"input": {"text": "a"}}', headers)
    assert connection.getresponse().status == 406


def test_the_schema_is_served(url):
    assert fetch_schema(url)["components"]["schemas"]["Input"]["required"] == ["text"]


def test_a_prediction_returns_output_metrics_and_a_growing_log(url):
    logs = []
    reply = predict(url, {"text": "hello", "steps": 20}, on_logs=logs.append)
    assert base64.b64decode(reply["output"].partition(",")[2]) == b"hello"
    assert reply["metrics"]["seed"] == 7
    lengths = [len(log) for log in logs if log]
    assert len(set(lengths)) > 1 and lengths == sorted(lengths)
    assert "progress: writing 19/20" in logs[-1]


def test_a_file_travels_as_a_data_uri(url):
    uri = "data:text/plain;base64," + base64.b64encode(b"inside").decode()
    reply = predict(url, {"text": "outside", "file": uri})
    assert base64.b64decode(reply["output"].partition(",")[2]) == b"inside"


def test_text_that_is_not_utf8_is_refused_by_the_server(url):
    with pytest.raises(PredictionError, match="Failed to parse the request body as JSON"):
        predict(url, {"text": "caf\udce9"})


def test_a_request_right_after_a_result_is_served(url):
    for number in range(10):
        assert predict(url, {"text": str(number)})["metrics"]["text"] == str(number)


def test_a_busy_server_is_a_clear_error(url):
    thread = start_slowly(url, "busy2")
    try:
        with pytest.raises(PredictionError, match="At capacity"):
            predict(url, {"text": "a"})
    finally:
        request(url, "POST", "/predictions/busy2/cancel")
        thread.join()


def test_the_clients_messages_are_the_servers(url):
    with pytest.raises(PredictionError, match=r"^steps: 501 is greater than the maximum of 500$"):
        predict(url, {"text": "a", "steps": 501})
    with pytest.raises(PredictionError, match=r"^ValueError: boom$"):
        predict(url, {"text": "a", "fail": True})
    with pytest.raises(PredictionError, match="lost the server"):
        predict(f"http://127.0.0.1:{free_port()}", {"text": "a"})


def test_an_interrupt_cancels_the_prediction(url):
    def interrupt(log: str) -> None:
        if "writing 3/" in log:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        predict(url, {"text": "slow", "steps": 400}, on_logs=interrupt)
    wait_until_idle(url, seconds=10)
    assert time.monotonic() - began < 15, "20 seconds of work were not cut short"
    assert predict(url, {"text": "after"})["status"] == "succeeded"


def test_a_prediction_that_someone_else_cancels_raises_canceled(url):
    def cancel(log: str) -> None:
        if "writing 3/" in log:
            status, _ = request(url, "POST", f"/predictions/{identifiers[0]}/cancel")
            assert status == 200

    identifiers = []
    original = secrets.token_hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.token_hex", lambda size: identifiers.append(original(size)) or identifiers[-1])
        with pytest.raises(Canceled):
            predict(url, {"text": "slow", "steps": 400}, on_logs=cancel)


def test_two_servers_run_side_by_side(url, tmp_path):
    other = sample_config(tmp_path, SAMPLE.replace("le=500", "le=3"))
    with Server(other, timeout=60) as second:
        assert second.url != url
        with pytest.raises(PredictionError, match="maximum of 3"):
            predict(second.url, {"text": "a", "steps": 4})
        assert predict(url, {"text": "a", "steps": 4})["metrics"]["steps"] == 4
    assert health(second.url) == {}
    assert not second.backend.scratch.exists()


def test_a_failing_setup_shows_its_reason_and_leaves_nothing(sample):
    logs = []
    server = Server(sample, environment={"SAMPLE_FAILS": "1"}, on_log=logs.append, timeout=60)
    with pytest.raises(ServerError, match="sample did not start: RuntimeError: no weights here"):
        server.start()
    server.stop()
    assert not server.backend.scratch.exists()
    assert health(server.url) == {}


def test_the_setup_log_is_passed_on(sample):
    logs = []
    with Server(sample, on_log=logs.append, timeout=60) as server:
        predict(server.url, {"text": "quiet"})
        wait_for(lambda: "writing quiet" in server.log)
        assert "sample is setting up" in logs
        assert not any("quiet" in line for line in logs)


def test_a_port_in_use_is_a_clear_error(serve, sample):
    taken = serve(sample).port
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{taken}"):
        Server(sample, port=taken).start()


def test_training_is_served_and_validated(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "train.py").write_text(
        "from cog import BaseModel, Input, Path\n"
        "class TrainingOutput(BaseModel):\n    weights: Path\n"
        "def train(rounds: int = Input(description='rounds', default=2, ge=1, le=5)) -> TrainingOutput:\n"
        "    Path('w.tar').write_text('x' * rounds)\n    return TrainingOutput(weights=Path('w.tar'))\n"
    )
    config = sample_config(tmp_path)
    config = replace(config, train=tmp_path / "training" / "train.py")
    with Server(config, mode="train", timeout=60) as server:
        with pytest.raises(PredictionError, match="rounds: 9 is greater than the maximum of 5"):
            predict(server.url, {"rounds": 9}, kind="trainings")
        reply = predict(server.url, {"rounds": 3}, kind="trainings")
        assert base64.b64decode(reply["output"]["weights"].partition(",")[2]) == b"xxx"


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "lib.commands.predict", *arguments]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_the_command_writes_to_the_working_directory_and_prints_how_to_repeat_it(url, tmp_path):
    first = run_cli("t2v", "--url", url, "-i", "text=two words", "-i", "seed=", cwd=tmp_path)
    assert (first.returncode, first.stdout) == (0, "output.txt\n"), first.stderr
    assert f"again: script/predict t2v -i 'text=two words' -i seed=7 --url {url}" in first.stderr
    assert "seed 7" in first.stderr and "progress:" not in first.stderr
    second = run_cli("t2v", "--url", url, "-i", "text=other", cwd=tmp_path)
    assert second.stdout == "output.1.txt\n"
    assert (tmp_path / "output.txt").read_text() == "two words"
    assert (tmp_path / "output.1.txt").read_text() == "other"
    third = run_cli("t2v", "--url", url, "-i", "text=x", "-o", "named.txt", cwd=tmp_path)
    assert (third.stdout, (tmp_path / "named.txt").read_text()) == ("named.txt\n", "x")
    assert f"again: script/predict t2v -i text=x -i seed=7 -o named.txt --url {url}" in third.stderr


def test_the_command_fails_with_the_servers_message(url, tmp_path):
    done = run_cli("t2v", "--url", url, "-i", "text=a", "-i", "fail=true", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "ValueError: boom"
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_an_unknown_input_before_sending(url, tmp_path):
    done = run_cli("t2v", "--url", url, "-i", "txt=a", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no input 'txt'. Did you mean text?" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_cancels_and_exits_130(serve, sample, url, tmp_path):
    log = serve(sample).log
    command = [sys.executable, "-P", "-m", "lib.commands.predict", "t2v", "--url", url]
    command += ["-i", "text=slow", "-i", "steps=400"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: "progress: writing 10/400" in log)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "cancelled"
    wait_until_idle(url, seconds=10)
    assert not list(tmp_path.iterdir())
