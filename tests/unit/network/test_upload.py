"""Uploads to a Hub that refuses at once or fails later: a failed upload does not lose the training."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from lib.errors import UserError
from tests.training_factory import config
from tests.writable_hub import TOKEN, Hub
from training.result import Publisher


@pytest.fixture
def hub(monkeypatch):
    with Hub() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as lib.network.offline.go_offline leaves it
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield made


@pytest.fixture
def result(tmp_path) -> Path:
    folder = tmp_path / "result"
    (folder / "validation").mkdir(parents=True)
    (folder / "lora.safetensors").write_bytes(bytes(range(256)) * 20)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\nA star.\n")
    (folder / "validation" / "step-000002-1.mp4").write_bytes(b"video")
    return folder


def contents(folder: Path, prefix: str = "") -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {prefix + path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def publisher(lines: list[str] | None = None, *, active: bool = True, **settings) -> Publisher:
    settings = {"hub_model_id": "me/star", "hub_token": TOKEN} | settings
    return Publisher(
        config(**settings).publishing, (lines if lines is not None else []).append, active=active
    )


def test_a_result_is_uploaded_completely_to_a_new_private_repository(hub, result):
    lines: list[str] = []
    made = publisher(lines)
    assert hub.repositories == {"me/star": {}} and hub.private["me/star"]
    made.result(result)
    assert hub.repositories["me/star"] == contents(result)
    assert lines == ["uploaded to https://huggingface.co/me/star"]
    assert hub.messages == ["LoRA, model card and loss curve"]


def test_an_existing_repository_is_used_and_keeps_its_files(hub, result):
    publisher().result(result)
    hub.repositories["me/star"]["old.txt"] = b"old"
    (result / "README.md").write_text("A better star.\n")
    publisher().result(result)
    assert hub.repositories["me/star"] == contents(result) | {"old.txt": b"old"}


def test_checkpoints_are_uploaded_to_their_own_folders_only_on_request(hub, tmp_path):
    folder = tmp_path / "step-00000500"
    folder.mkdir()
    for name in ("lora.safetensors", "training.pt", "state.json"):
        (folder / name).write_bytes(name.encode() * 40)
    lines: list[str] = []
    publisher(lines).checkpoint(folder)
    assert hub.repositories["me/star"] == {}
    publisher(lines, push_checkpoints=True).checkpoint(folder)
    assert hub.repositories["me/star"] == contents(folder, "checkpoints/step-00000500/")
    assert hub.messages == ["Checkpoint step-00000500"] and lines == []


def test_without_a_repository_or_on_other_processes_the_hub_is_not_contacted(hub, result):
    for made in (publisher(active=False, push_checkpoints=True), publisher(hub_model_id="", hub_token="")):
        made.result(result)
        made.checkpoint(result)
    assert hub.requests == []


# Who may write


def test_a_token_is_needed_and_may_come_from_the_environment(hub, monkeypatch):
    with pytest.raises(UserError) as caught:
        publisher(hub_token="")
    assert str(caught.value) == (
        "hub_model_id=me/star needs hub_token, a Hugging Face token with write access."
    )
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError):  # a server's own token is not for those who send it requests
        publisher(hub_token="")
    assert hub.requests == []
    monkeypatch.setenv("COGVIDEOX_LOCAL_SOURCES", "1")
    publisher(hub_token="")
    assert hub.repositories == {"me/star": {}}


@pytest.mark.parametrize("kind", ["unknown", "reads, no repository", "reads another's repository"])
def test_a_token_that_may_not_write_is_refused_before_the_training(hub, kind):
    token = "hf_another"
    if kind != "unknown":
        hub.readers.add(token)
    if kind == "reads another's repository":
        publisher()
    with pytest.raises(UserError) as caught:
        publisher(hub_token=token)
    message = str(caught.value)
    assert message.startswith("hub_model_id=me/star cannot be written to: ")
    assert ("401" if kind == "unknown" else "403") in message
    assert message.endswith("Check the name, and that hub_token has write access.") and ".." not in message
    assert token not in message and constants.HF_HUB_OFFLINE is True


def test_a_name_that_the_hub_rejects_is_refused(hub):
    with pytest.raises(UserError, match=r"hub_model_id=me/a\.\.b cannot be written to: "):
        publisher(hub_model_id="me/a..b")


def test_an_unreachable_hub_is_reported_before_the_training(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"hub_model_id=me/star cannot be written to: .*refused"):
        publisher()
    assert constants.HF_HUB_OFFLINE is True


# Failing later


@pytest.mark.parametrize("place", ["preupload", "objects/batch", "/put/", "commit"])
def test_an_upload_that_fails_is_reported_and_stops_nothing(hub, result, place):
    lines: list[str] = []
    made = publisher(lines, push_checkpoints=True)
    hub.failing = place
    made.checkpoint(result)
    made.result(result)
    assert len(lines) == 2
    assert all(line.startswith("result could not be uploaded to me/star: ") for line in lines)
    assert not any(TOKEN in line or "\n" in line for line in lines)
    assert hub.repositories["me/star"] == {}
    assert constants.HF_HUB_OFFLINE is True
    hub.failing = ""
    made.result(result)
    assert hub.repositories["me/star"] == contents(result)


def test_loading_models_stays_offline_around_uploads_and_nothing_else_is_requested(hub, result, capfd):
    publisher().result(result)
    assert constants.HF_HUB_OFFLINE is True
    assert not [asked for asked in hub.requests if "agent" in asked or "telemetry" in asked]
    assert capfd.readouterr() == ("", "")
