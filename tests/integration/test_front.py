"""What faces callers: nothing of coglet's trust in them is left, and a dead worker is replaced."""

import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.serving.client import PredictionError, fetch_schema, health, predict, request
from lib.serving.server import Server
from tests.integration.conftest import start_slowly, wait_for
from tests.serving import wait_until_idle
from tests.webhook_host import WebhookHost


@pytest.fixture(scope="module")
def server(serve, sample) -> Server:
    """A server as script/serve starts it: no addresses of this machine in requests."""
    return serve(sample, local_sources=False)


@pytest.fixture
def url(server) -> str:
    wait_until_idle(server.url)
    return server.url


@pytest.fixture
def open_url(serve, sample) -> str:
    """A server whose requests may name addresses of this machine."""
    running = serve(sample)
    wait_until_idle(running.url)
    return running.url


@pytest.fixture
def hook() -> Iterator[WebhookHost]:
    with WebhookHost() as host:
        yield host


def send(url: str, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]))
    content = None if body is None else json.dumps(body)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, content, {"Content-Type": "application/json"} | names)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read() or b"{}")


def folders(server: Server) -> list[str]:
    """The folders that coglet has made for predictions."""
    return [path.name for path in (server.backend.scratch / "predictions").glob("*")]


BAD_IDS = [
    "a%2Fb",
    "..%2F..%2Fetc",
    "%2Ftmp%2Fx",
    "..",
    "a%00b",
    "a%20b",
    "a.b",
    "%C3%A9",
    "a\\b",
    "a" * 65,
]


@pytest.mark.parametrize("identifier", BAD_IDS)
def test_an_id_that_is_no_plain_name_is_refused_in_address_and_body(server, url, identifier):
    for method, end in [("PUT", ""), ("POST", "/cancel")]:
        status, reply = send(url, method, f"/predictions/{identifier}{end}", {"input": {"text": "a"}})
        assert status == 422, (method, reply)
        assert "is not an id: use 1 to 64 letters, digits, - and _" in reply["detail"][0]["msg"]
    status, reply = send(url, "POST", "/predictions", {"id": f"../{identifier}", "input": {"text": "a"}})
    assert (status, reply["detail"][0]["loc"]) == (422, ["body", "id"])
    assert folders(server) == []


def test_an_id_of_5000_characters_is_refused_and_the_server_stays_ready(url):
    status, reply = send(url, "PUT", f"/predictions/{'a' * 5000}", {"input": {"text": "a"}})
    assert status == 422 and len(json.dumps(reply)) < 400
    assert predict(url, {"text": "after"})["status"] == "succeeded"


def test_ids_of_every_allowed_form_come_back_as_they_were_sent(server, url):
    for identifier in ("a", "A-b_9", "x" * 64):
        wait_until_idle(url)
        assert send(url, "PUT", f"/predictions/{identifier}", {"input": {"text": "a"}})[1]["id"] == identifier
        wait_until_idle(url)
        body = {"id": identifier, "input": {"text": "a"}}
        assert send(url, "POST", "/predictions", body)[1]["id"] == identifier
    assert send(url, "PUT", "/predictions/a", {"id": "b", "input": {"text": "a"}})[0] == 422
    assert folders(server) == []


def test_nothing_of_coglets_is_left_in_the_temporary_folder(server, url):
    fixed = Path("/tmp/coglet")
    before = sorted(fixed.rglob("*")) if fixed.exists() else None
    for number in range(3):
        predict(url, {"text": str(number)})
    status, reply = send(url, "POST", "/predictions", {"input": {"text": "a"}}, Prefer="respond-async")
    assert status == 202
    wait_until_idle(url)
    assert folders(server) == [reply["id"]], "kept until the next prediction, like its result"
    predict(url, {"text": "next"})
    assert folders(server) == []
    assert (sorted(fixed.rglob("*")) if fixed.exists() else None) == before


def test_the_front_is_the_only_address_that_is_printed_or_known(server, url):
    assert server.backend.host != "127.0.0.1" and server.backend.url != url
    assert server.backend.url not in "\n".join(server.log)


def test_shutdown_is_refused(url):
    assert send(url, "POST", "/shutdown") == (
        403,
        {"detail": "this server is stopped where it was started, not by a request"},
    )
    assert predict(url, {"text": "after"})["status"] == "succeeded"


def test_a_prediction_server_has_no_trainings_and_says_what_it_has(url):
    for method, path in [("POST", "/trainings"), ("PUT", "/trainings/a"), ("POST", "/trainings/a/cancel")]:
        status, reply = send(url, method, path, {"input": {}})
        assert status == 404
        assert f"{path!r} does not exist; this server has /predictions, /predictions/ID" in reply["detail"]
    document = fetch_schema(url)
    assert not [name for name in document["components"]["schemas"] if "Training" in name]
    assert not [path for path in document["paths"] if "trainings" in path]


@pytest.mark.parametrize(
    "webhook",
    ["http://127.0.0.1:9/a", "https://127.0.0.1:9/a", "https://169.254.169.254/latest", "http://example.com/",
     "file:///etc/passwd", "ftp://example.com/a", "https://[", "https://user@127.0.0.1/", "", 7, ["a"]],
)  # fmt: skip
def test_a_webhook_to_an_address_that_inputs_may_not_name_is_422(url, webhook):
    status, reply = send(url, "POST", "/predictions", {"input": {"text": "a"}, "webhook": webhook})
    assert (status, reply["detail"][0]["loc"]) == (422, ["body", "webhook"])


def test_webhooks_carry_the_callers_id_and_nothing_of_the_server(open_url, hook, serve, sample):
    body = {"input": {"text": "a"}, "webhook": hook.url}
    assert send(open_url, "PUT", "/predictions/hooked", body)[0] == 200
    assert hook.wait_for("hooked", "succeeded")["metrics"]["text"] == "a"
    assert str(serve(sample).backend.scratch) not in json.dumps(hook.events)


def test_a_webhook_that_redirects_is_not_followed(open_url, hook):
    paths = []

    class Redirects(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            self.send_response(307)
            self.send_header("Location", hook.url)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as receiver:
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        webhook = f"http://127.0.0.1:{receiver.server_address[1]}/first"
        body = {"input": {"text": "a"}, "webhook": webhook, "webhook_events_filter": ["completed"]}
        assert send(open_url, "POST", "/predictions", body)[0] == 200
        wait_for(lambda: paths)
        time.sleep(0.5)
        receiver.shutdown()
    assert set(paths) == {"/first"} and hook.events == []


def test_the_relay_accepts_nothing_without_its_key(url):
    for key in ("", "a", "..", "A" * 43):
        assert send(url, "POST", f"/webhooks/{key}", {"id": "a", "status": "succeeded"})[0] in (404, 405)


def test_a_page_of_another_site_has_no_effect(url):
    for method, path in [("POST", "/predictions"), ("PUT", "/predictions/page"), ("POST", "/shutdown")]:
        status, _ = send(url, method, path, {"input": {"text": "a"}}, Origin="https://example.com")
        assert status == 403
    assert send(url, "GET", "/health-check", Host="rebound.example.com")[0] == 421
    connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]))
    connection.request("POST", "/predictions", '{"input": {"text": "a"}}', {"Content-Type": "text/plain"})
    assert connection.getresponse().status == 415
    assert health(url)["status"] == "READY"


def test_a_body_of_more_than_100_mib_is_413_and_the_next_request_works(url):
    with pytest.raises(PredictionError, match=r"larger than 104.9 MB; give the https"):
        predict(url, {"text": "a" * (101 << 20)})
    assert predict(url, {"text": "after"})["status"] == "succeeded"


def test_a_refusal_does_not_repeat_a_long_input(url):
    status, reply = send(url, "POST", "/predictions", {"input": {"text": {"name": "y" * 50_000}}})
    assert status == 422 and len(json.dumps(reply)) < 700
    (found,) = reply["detail"]
    assert found["loc"] == ["body", "input", "text"] and "is not of type" in found["msg"]


def test_closing_the_connection_cancels_the_prediction(url):
    connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]))
    body = json.dumps({"input": {"text": "slow", "steps": 400}})
    connection.request("POST", "/predictions", body, {"Content-Type": "application/json"})
    wait_for(lambda: health(url)["status"] == "BUSY")
    connection.close()
    wait_until_idle(url, seconds=5)


def test_with_a_token_nothing_works_without_it(sample, monkeypatch, tmp_path):
    monkeypatch.setenv("COGVIDEOX_API_TOKEN", "secret-of-the-test")
    with Server(sample, host="0.0.0.0", on_log=lambda line: None, timeout=60) as server:
        for method, path in [("GET", "/health-check"), ("GET", "/openapi.json"), ("POST", "/predictions")]:
            assert send(server.url, method, path, {"input": {"text": "a"}})[0] == 401
        assert predict(server.url, {"text": "a"})["status"] == "succeeded", "the client sends it"
        environment = Path(f"/proc/{server.backend.process.pid}/environ").read_text()
        assert "secret-of-the-test" not in environment


def test_a_server_for_other_machines_does_not_start_without_a_token(sample):
    with pytest.raises(UserError, match="set COGVIDEOX_API_TOKEN"):
        Server(sample, host="0.0.0.0").start()


def worker_of(server: Server) -> int:
    return server.backend._worker.pid


def test_after_each_death_of_the_worker_the_next_request_works(sample):
    lines = []
    with Server(sample, on_log=lines.append, timeout=60) as server:
        began = time.monotonic()
        assert predict(server.url, {"text": "a"})["status"] == "succeeded"
        for number in range(3):
            os.kill(worker_of(server), 9)
            assert predict(server.url, {"text": str(number)})["metrics"]["text"] == str(number)
        assert time.monotonic() - began < 60
        assert lines.count("the worker process is ready again") == 3
        assert [line for line in lines if line.startswith("the worker process ended")]


def test_a_request_whose_worker_dies_says_so_and_the_next_works(sample):
    with Server(sample, on_log=lambda line: None, timeout=60) as server:
        replies = []
        call = ("PUT", "/predictions/doomed", {"input": {"text": "slow", "steps": 400}})
        thread = threading.Thread(target=lambda: replies.append(send(server.url, *call)))
        thread.start()
        wait_for(lambda: "progress: writing 12/400" in server.log)
        os.kill(worker_of(server), 9)
        thread.join(30)
        [(status, reply)] = replies
        assert (status, reply["status"], reply["id"]) == (200, "failed", "doomed")
        assert "worker process ended during this request" in reply["error"]
        assert predict(server.url, {"text": "after"})["status"] == "succeeded"


def test_the_second_start_is_reported_when_it_fails(sample, tmp_path):
    with Server(sample, on_log=lambda line: None, timeout=60) as server:
        server.environment["SAMPLE_FAILS"] = "1"
        os.kill(worker_of(server), 9)
        assert "sample did not start: RuntimeError: no weights here" in server.wait()
        status, body = request(server.url, "POST", "/predictions", {"input": {"text": "a"}})
        assert status == 503 and b"no weights here" in body
        assert health(server.url)["status"] == "DEFUNCT"


def test_a_slow_prediction_is_polled_under_its_own_id(url):
    thread = start_slowly(url, "polled")
    try:
        status, reply = send(url, "PUT", "/predictions/polled", {"input": []})
        assert (status, reply["id"], reply["status"]) == (202, "polled", "processing")
    finally:
        assert request(url, "POST", "/predictions/polled/cancel")[0] == 200
        thread.join()
