"""Both conversion predictors through a real server: results, refusals, addresses, uploads, cancelling."""

import base64
import hashlib
import json
import pickle
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.convert.report import REPORT
from lib.serving.client import health, request
from lib.serving.server import Server
from lib.storage.archive import extract_tar
from lib.storage.scratch import PREFIX
from tests.clips_factory import data_uri
from tests.convert_factory import (
    VAE_FILE,
    expected,
    expected_config,
    options,
    same_states,
    sat_transformer,
    save_sat,
    source,
    stored,
)
from tests.http_host import Host, Served
from tests.integration.conftest import wait_for
from tests.serving import wait_until_idle
from tests.webhook_host import WebhookHost
from tests.writable_hub import TOKEN

NAME = "t2v-2b-finetuned"
OVERRIDES = ", ".join(f"{name}={value}" for name, value in options(NAME).items())
STATES = "/transformer/1000/mp_rank_00_model_states.pt"
BINARY = "application/octet-stream"


@pytest.fixture(scope="module")
def host():
    """Serves checkpoints, and some whose download stalls."""
    files = {
        STATES: Served(source(NAME).read_bytes()),
        "/3d-vae.pt": Served(VAE_FILE.read_bytes()),
        "/silent.pt": Served(source(NAME).read_bytes(), stall_at=1000),
        "/stuck.pt": Served(source(NAME).read_bytes(), stall_at=1000),
        "/cut.pt": Served(source(NAME).read_bytes()[:-3000]),
        "/lora.pt": Served(source("lora-t2v-2b").read_bytes()),
    }
    with Host(files) as host:
        yield host


@pytest.fixture
def server(convert_server) -> Server:
    return convert_server


@pytest.fixture
def lora_server(export_server) -> Server:
    return export_server


@pytest.fixture
def cache(conversion_cache) -> Path:
    return conversion_cache


def send(server: Server, identifier: str, **inputs) -> tuple[int, dict]:
    wait_until_idle(server.url)
    webhook = {"webhook": inputs.pop("webhook")} if "webhook" in inputs else {}
    status, body = request(server.url, "PUT", f"/predictions/{identifier}", {"input": inputs} | webhook)
    return status, json.loads(body)


def upload(path: Path) -> str:
    return data_uri(path, BINARY)


def content(reply: dict) -> bytes:
    assert reply["status"] == "succeeded", reply
    return base64.b64decode(reply["output"].split(",", 1)[1])


def unpacked(reply: dict, target: Path) -> Path:
    tar = target.with_suffix(".tar")
    tar.write_bytes(content(reply))
    return extract_tar(tar, target)


def left(server: Server, cache: Path) -> list[str]:
    """Files that a request would have left: in the server's temporary folder, or fetched."""
    kept = [path for path in (server.backend.scratch / "tmp").rglob("*") if path.is_file()]
    return [path.name for path in [*kept, *(cache / "checkpoints").rglob("*")]]


def test_uploads_become_a_tar_of_a_folder_and_the_metrics_say_what_they_were(server, cache, tmp_path):
    with WebhookHost() as hook:
        _, reply = send(
            server, "both", transformer=upload(source(NAME)), vae=upload(VAE_FILE), dtype="float32",
            overrides=OVERRIDES, webhook=hook.url,
        )  # fmt: skip
        event = hook.wait_for("both", "succeeded")
    folder = unpacked(reply, tmp_path / "model")
    for component, name in (("transformer", NAME), ("vae", "vae")):
        assert same_states(stored(folder / component), expected(name))
        assert json.loads((folder / component / "config.json").read_text())["_class_name"].startswith(
            {"transformer": "CogVideoXT", "vae": "AutoencoderKLC"}[component]
        )
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "CogVideoXPipeline"
    metrics, count = reply["metrics"], len(expected(NAME)) + len(expected("vae"))
    assert metrics["variant"] == "a CogVideoX of 2 layers and width 32, of the cogvideox-2b family"
    assert (metrics["family"], metrics["tensors"]) == ("cogvideox-2b", count)
    assert metrics["sha256"] == hashlib.sha256(content(reply)).hexdigest()
    assert metrics["bytes"] == len(content(reply)) and metrics["seconds"] > 0
    report = json.loads((folder / REPORT).read_text())
    assert metrics["dropped"] == sum(len(part["dropped"]) for part in report["parts"]) > 0
    assert [part["source"] for part in report["parts"]] == ["transformer.bin", "vae.bin"]
    here = len(expected(NAME))
    assert f"progress: converting transformer {here}/{here}" in reply["logs"] == event["logs"]
    assert event["metrics"]["sha256"] == metrics["sha256"]
    assert str(server.backend.scratch) not in reply["logs"] + json.dumps(report)
    wait_for(lambda: left(server, cache) == ["converted.tar"])


def test_addresses_are_fetched_and_nothing_of_them_stays(server, host, cache, tmp_path):
    _, reply = send(
        server, "fetched", transformer_url=host.url(STATES) + "?token=secret", vae_url=host.url("/3d-vae.pt"),
        dtype="float32", overrides=OVERRIDES,
    )  # fmt: skip
    folder = unpacked(reply, tmp_path / "model")
    assert same_states(stored(folder / "transformer"), expected(NAME))
    assert same_states(stored(folder / "vae"), expected("vae"))
    assert "mp_rank_00_model_states.pt: downloading" in reply["logs"]
    assert "secret" not in reply["logs"] + (folder / REPORT).read_text()
    wait_for(lambda: left(server, cache) == ["converted.tar"])


def test_a_tar_of_the_result_converts_back(server, tmp_path):
    _, reply = send(
        server, "there", transformer=upload(source("t2v-5b")), overrides=OVERRIDES, dtype="float32"
    )
    tar = tmp_path / "model.tar"
    tar.write_bytes(content(reply))
    _, reply = send(server, "back", transformer=data_uri(tar, "application/x-tar"), direction="to_sat")
    folder = unpacked(reply, tmp_path / "sat")
    states = torch.load(folder / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    original = torch.load(source("t2v-5b"), weights_only=True)
    original = original.get("module", original)
    assert states and all(torch.equal(states[key], original[key]) for key in states)
    assert reply["metrics"]["variant"].endswith("of the cogvideox-5b family")


# Refusals


@pytest.mark.parametrize(
    "inputs",
    [
        {"direction": "sideways"},
        {"dtype": "int8"},
        {"family": "sd"},
        {"text_encoder": "perhaps"},
        {"transformer": 3},
        {"transformer_url": None},
    ],
)
def test_what_the_form_does_not_allow_is_refused(server, inputs):
    status, reply = send(server, "wrong", **inputs)
    assert status == 422, reply
    assert reply["detail"][0]["loc"][:2] == ["body", "input"]


@pytest.mark.parametrize("name", ["convert", "export_lora"])
def test_both_answer_as_every_predictor_does(server, lora_server, host, name):
    server = server if name == "convert" else lora_server
    slot = {"convert": "transformer", "export_lora": "lora"}[name]
    assert post(server, "{")[0] == 400
    assert http("GET", server, "/predictions/none")[0] == 405
    assert http("POST", server, "/predictions/none/cancel")[0] == 404
    assert send(server, f"{name}-wrong", direction=None)[0] == 422
    status, reply = send(server, f"{name}-unknown", colour="red")  # what is not known is left out
    needed = {"convert": "Give a transformer, a VAE or both", "export_lora": "Give a LoRA"}[name]
    assert (status, reply["status"]) == (200, "failed") and needed in reply["error"], reply
    slow = {f"{slot}_url": host.url("/silent.pt")}
    with WebhookHost() as hook:
        body = {"id": f"{name}-slow", "input": slow, "webhook": hook.url}
        wait_until_idle(server.url)
        earlier = len(host.requests)
        status, text = post(server, json.dumps(body), prefer="respond-async")
        assert (status, json.loads(text)["status"]) == (202, "starting")
        wait_for(lambda: health(server.url)["status"] == "BUSY")
        assert http("PUT", server, f"/predictions/{name}-slow", {"input": slow})[0] == 202
        assert post(server, json.dumps({"input": {}}))[0] == 409
        wait_for(lambda: len(host.requests) > earlier)  # coglet loses a cancel that precedes the predictor
        assert http("POST", server, f"/predictions/{name}-slow/cancel")[0] == 200
        hook.wait_for(f"{name}-slow", "canceled")
    wait_until_idle(server.url)


def http(method: str, server: Server, path: str, body: dict | None = None) -> tuple[int, bytes]:
    return request(server.url, method, path, body)


def post(server: Server, body: str, *, prefer: str = "") -> tuple[int, str]:
    parts = urlsplit(server.url)
    connection = HTTPConnection(parts.hostname, parts.port, timeout=30)
    headers = {"Content-Type": "application/json"} | ({"Prefer": prefer} if prefer else {})
    connection.request("POST", "/predictions", body, headers)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


class Malicious:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self.place,)


def test_every_refusal_names_the_file_and_the_reason_and_the_next_request_works(
    server, host, cache, tmp_path
):
    unet = {"input_blocks.0.0.weight": torch.zeros(2, 2)}
    save_file(unet, tmp_path / "unet.safetensors")
    torch.save({"module": {"a": Malicious(tmp_path / "executed")}}, tmp_path / "bad.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    (tmp_path / "page.html").write_text("<html>Sign in</html>")
    big = {"transformer": upload(source(NAME)), "overrides": OVERRIDES}
    refusals = [
        ({}, "Give a transformer, a VAE or both"),
        ({**big, "transformer_url": host.url(STATES)}, "Give transformer or transformer_url, not both."),
        ({"transformer": upload(VAE_FILE), "vae": upload(source(NAME))}, "The two files are swapped: "),
        ({"transformer": upload(VAE_FILE)}, "transformer.bin is a SAT video VAE; a CogVideoX transformer"),
        (
            {"vae": upload(VAE_FILE)},
            "family is needed for a VAE alone, because its scaling cannot be read from the weights.",
        ),
        ({**big, "family": "cogvideox-5b"}, "family=cogvideox-5b was given, but its tensors show"),
        ({**big, "direction": "to_sat"}, "is already in the SAT layout"),
        ({**big, "overrides": "layers=3"}, "layers=3 cannot be overridden; allowed are sample_height"),
        ({**big, "text_encoder": True}, "the released one has 4096: text_encoder=true is not supported"),
        ({**big, "hub_repository": "me/it"}, "hub_repository=me/it needs hub_token"),
        ({**big, "hub_repository": "me/it", "hub_token": "hf_no"}, "hub_repository=me/it cannot be written"),
        ({"transformer": upload(tmp_path / "unet.safetensors")}, "is a UNet, such as Stable Diffusion's"),
        ({"transformer": upload(tmp_path / "bad.pt")}, "Nothing was executed."),
        ({"transformer": upload(tmp_path / "plain.pkl")}, "is a pickle that torch.save did not write"),
        ({"transformer": upload(tmp_path / "page.html")}, "is a web page, not the file itself"),
        ({"transformer_url": host.url("/cut.pt")}, "cut.pt is damaged or cut off"),
        ({"transformer_url": host.url("/none.pt")}, "the host has nothing at this address (HTTP 404)"),
        ({"transformer_url": str(tmp_path / "none.pt")}, "There is no file or folder"),
    ]
    for place, (inputs, message) in enumerate(refusals):
        status, reply = send(server, f"refused-{place}", **inputs)
        assert (status, reply["status"]) == (200, "failed"), (message, reply)
        assert message in reply["error"], reply
    assert not (tmp_path / "executed").exists()
    wait_for(lambda: left(server, cache) in ([], ["converted.tar"]))
    assert content(send(server, "good", **big)[1])


def test_a_cancelled_download_leaves_nothing_that_counts_and_the_server_works_on(server, host, cache):
    url = host.url("/stuck.pt")
    thread = threading.Thread(target=send, args=(server, "cancelled"), kwargs={"transformer_url": url})
    thread.start()
    wait_for(lambda: host.bodies("/stuck.pt"))
    began = time.monotonic()
    assert request(server.url, "POST", "/predictions/cancelled/cancel")[0] == 200
    thread.join(60)
    assert time.monotonic() - began < 25 and not thread.is_alive()
    wait_until_idle(server.url)
    assert health(server.url)["status"] == "READY"
    wait_for(lambda: not left(server, cache))
    assert list((server.backend.scratch / "tmp").glob(f"{PREFIX}*/*")) == []
    assert content(send(server, "after", transformer=upload(source(NAME)), overrides=OVERRIDES)[1])


def test_a_cancel_in_the_middle_of_writing_leaves_nothing_and_the_server_works_on(server, cache, tmp_path):
    large = save_sat(tmp_path / "given" / "large.pt", sat_transformer(heads=16, head_dim=64, layers=8))
    replies: list[dict] = []
    inputs = {"transformer_url": str(large), "overrides": "sample_frames=9", "dtype": "float32"}
    thread = threading.Thread(target=lambda: replies.append(send(server, "halfway", **inputs)[1]))
    thread.start()
    deadline, enough = time.monotonic() + 60, large.stat().st_size / 10
    while written(server) < enough:
        assert time.monotonic() < deadline and not replies, replies
        time.sleep(0.002)
    assert http("POST", server, "/predictions/halfway/cancel")[0] == 200
    thread.join(30)
    assert [(reply["status"], reply.get("output")) for reply in replies] == [("canceled", None)]
    wait_until_idle(server.url)
    wait_for(lambda: not left(server, cache))
    assert list((server.backend.scratch / "tmp").glob(f"{PREFIX}*/*")) == []
    assert [path.name for path in large.parent.iterdir()] == ["large.pt"]
    large.unlink()
    assert content(send(server, "resumed", transformer=upload(source(NAME)), overrides=OVERRIDES)[1])


def written(server: Server) -> int:
    """Bytes of weights that the running request has written."""
    files = (server.backend.scratch / "tmp").glob(f"{PREFIX}*/**/*.partial/transformer/*.safetensors")
    return sum(path.stat().st_size for path in files)


def test_the_result_is_uploaded_too(server, hub):
    _, reply = send(
        server, "published", transformer=upload(source(NAME)), overrides=OVERRIDES,
        hub_repository="me/fox", hub_token=TOKEN,
    )  # fmt: skip
    assert reply["metrics"]["uploaded"] is True and TOKEN not in json.dumps(reply["logs"])
    assert hub.private["me/fox"]
    assert {"model_index.json", "README.md", "transformer/config.json"} <= hub.repositories["me/fox"].keys()


# LoRAs


def test_a_lora_comes_back_with_its_scale_in_it(lora_server, host, tmp_path):
    wanted = expected("lora-t2v-2b")  # without the scale
    replies = [
        send(lora_server, "sent", lora=upload(source("lora-t2v-2b")), alpha=2)[1],
        send(lora_server, "fetched", lora_url=host.url("/lora.pt"), alpha=2)[1],
    ]
    assert content(replies[0]) == content(replies[1])
    (tmp_path / "lora.safetensors").write_bytes(content(replies[0]))
    found = load_file(tmp_path / "lora.safetensors")
    assert found.keys() == {key if key.startswith("transformer.") else f"transformer.{key}" for key in wanted}
    for key, tensor in wanted.items():
        scale = 2 / 4 if ".lora_B." in key else 1
        assert torch.equal(found[key if key in found else f"transformer.{key}"], tensor * scale)
    metrics = replies[0]["metrics"]
    assert (metrics["rank"], metrics["alpha"], metrics["tensors"]) == (4, 2, 16)
    assert metrics["sha256"] == hashlib.sha256(content(replies[0])).hexdigest()
    _, reply = send(lora_server, "back", lora=upload(tmp_path / "lora.safetensors"), direction="to_sat")
    (tmp_path / "back.pt").write_bytes(content(reply))
    back = torch.load(tmp_path / "back.pt", weights_only=True)["module"]
    original = torch.load(source("lora-t2v-2b"), weights_only=True)
    original = original.get("module", original)
    assert len(back) == 16 and all(torch.equal(back[key], original[key]) for key in back)


def test_files_that_are_not_loras_are_refused_and_the_next_request_works(lora_server, tmp_path):
    torch.save({"module": {"a": Malicious(tmp_path / "executed")}}, tmp_path / "bad.pt")
    for place, (inputs, message) in enumerate(
        [
            ({}, "Give a LoRA: upload it as lora, or give its address as lora_url."),
            ({"lora": upload(source("t2v-5b"))}, "lora.bin is a SAT CogVideoX transformer; a LoRA was"),
            ({"lora": upload(tmp_path / "bad.pt")}, "Nothing was executed."),
            ({"lora": upload(source("lora-t2v-2b")), "alpha": 0}, "alpha=0 is not supported"),
        ]
    ):
        _, reply = send(lora_server, f"refused-{place}", **inputs)
        assert reply["status"] == "failed" and message in reply["error"], reply
    assert not (tmp_path / "executed").exists()
    assert send(lora_server, "wrong", alpha="much")[0] == 422
    assert content(send(lora_server, "good", lora=upload(source("lora-t2v-2b")))[1])


def test_configurations_are_those_of_the_released_models(server, tmp_path):
    _, reply = send(
        server, "config", vae=upload(VAE_FILE), family="cogvideox-5b", overrides="norm_num_groups=2"
    )
    folder = unpacked(reply, tmp_path / "vae")
    config = json.loads((folder / "vae" / "config.json").read_text())
    wanted = expected_config("vae")
    assert {key: config[key] for key in wanted if not key.startswith("_")} == {
        key: value for key, value in wanted.items() if not key.startswith("_")
    }
