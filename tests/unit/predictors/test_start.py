import gc
import socket
import sys
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.predictors.start import start_caption, start_video

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def without_torch(monkeypatch) -> None:
    """Let any further import of torch, and of the modules that import it, fail."""
    for name in ("torch", "lib.predictors.video", "lib.predictors.caption"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        ("i2v", "cogvideox-2b", "cogvideox-2b is a model for text-to-video"),
        ("t2v", "cogvideox1.5-5b-i2v", "this predictor does text-to-video"),
        ("t2v", str(ROOT / "weights" / "tiny-i2v"), "tiny-i2v is a model for image-to-video"),
        ("t2v", "cogvlm2-caption", "cogvlm2-caption is a model for captioning"),
        ("t2v", "no-such-model", "no-such-model"),
    ],
)
def test_a_model_that_cannot_do_the_task_is_refused_before_any_download(
    monkeypatch, without_torch, task, model, message
):
    def forbidden(*arguments, **options):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setenv("COGVIDEOX_MODEL", model)
    with pytest.raises(UserError, match=message):
        start_video(task=task)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("COGVIDEOX_OFFLOAD", "disk"),
        ("COGVIDEOX_ATTENTION", "slow"),
        ("COGVIDEOX_COMPILE", "yes"),
        ("COGVIDEOX_QUANTIZATION", "2bit"),
        ("COGVIDEOX_ANY_SIZE", "true"),
        ("COGVIDEOX_LORA_CACHE_GB", "-1"),
        ("COGVIDEOX_DTYPE", "int8"),
    ],
)
def test_a_variable_with_an_unknown_value_is_refused_before_torch_is_imported(
    monkeypatch, without_torch, variable, value
):
    monkeypatch.setenv(variable, value)
    for start in (start_caption, lambda: start_video("t2v")):
        with pytest.raises(UserError, match=f"{variable}={value} is"):
            start()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_failed_start_leaves_the_garbage_collector_as_it_was(monkeypatch, enabled):
    seen = []

    def refuse(_task: str) -> None:
        seen.append(gc.isenabled())
        raise UserError("no such model")

    monkeypatch.setattr("lib.predictors.start.resolve_model", refuse)
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(UserError, match="no such model"):
            start_video("t2v")
        assert seen == [False] and gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
