"""Local servers for the tests: real coglet processes on 127.0.0.1, started once per session and setting."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lib.serving.client import health, request
from lib.serving.registry import PredictorConfig
from lib.serving.server import Server
from tests.writable_hub import Hub

# A predictor without a model that starts quickly and can be slow, fail, and return each format.
SAMPLE = """
import os
import time
from typing import Optional

from cog import BaseRunner, Input, Path


class Runner(BaseRunner):
    def setup(self) -> None:
        print("sample is setting up")
        if os.environ.get("SAMPLE_FAILS"):
            raise RuntimeError("no weights here")

    def run(
        self,
        text: str = Input(description="what to write"),
        steps: int = Input(description="how long", default=1, ge=1, le=500),
        scale: float = Input(description="a number", default=6, ge=1, le=20),
        ending: str = Input(description="format", choices=["txt", "mp4"], default="txt"),
        file: Optional[Path] = Input(description="a file", default=None),
        seed: Optional[int] = Input(description="seed", default=None),
        fail: bool = Input(description="whether to fail", default=False),
    ) -> Path:
        print(f"writing {text}")
        for step in range(steps):
            print(f"progress: writing {step}/{steps}")
            time.sleep(0.05)
        if fail:
            raise ValueError("boom")
        self.record_metric("seed", 7 if seed is None else seed)
        self.record_metric("text", text)
        self.record_metric("steps", steps)
        if file is not None:
            text = file.read_text()
        path = Path("result." + ending)
        path.write_text(text)
        return path
"""

Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """`serve("t2v")` is a running server, kept for the session; keyword arguments are those of Server.

    Calls with equal arguments share one server, so a test must leave it ready.
    """
    running: dict[str, Server] = {}

    def start(name: str | PredictorConfig, **options) -> Server:
        key = repr((name, sorted(options.items())))
        if key not in running:
            options.setdefault("local_sources", True)
            running[key] = Server(name, timeout=300, **options).__enter__()
        return running[key]

    yield start
    with ThreadPoolExecutor() as pool:  # at once, as each takes a second to end
        list(pool.map(Server.stop, running.values()))


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="session")
def conversion_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("conversion")


@pytest.fixture(scope="session")
def convert_server(serve, conversion_cache, hub) -> Server:
    environment = {
        "COGVIDEOX_CACHE": str(conversion_cache),
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
    }
    return serve("convert", environment=environment)


@pytest.fixture(scope="session")
def export_server(serve, conversion_cache) -> Server:
    return serve("export_lora", environment={"COGVIDEOX_CACHE": str(conversion_cache)})


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> PredictorConfig:
    """The configuration of SAMPLE."""
    return sample_config(tmp_path_factory.mktemp("sample"))


def sample_config(folder: Path, source: str = SAMPLE) -> PredictorConfig:
    """Writes a predictor and its cog.yaml into `folder`."""
    predictor = folder / "predict_sample.py"
    predictor.write_text(source)
    file = folder / "cog.yaml"
    file.write_text("run: predict_sample.py:Runner\n")
    return PredictorConfig(name="sample", file=file, predictor=predictor, class_name="Runner")


def wait_for(condition, *, seconds: float = 60.0):
    """Return the first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not true after {seconds:.0f} s"
        time.sleep(0.05)
    return value


def start_slowly(url: str, identifier: str, **inputs) -> threading.Thread:
    """Start a prediction of several seconds in the background and wait until it runs."""
    body = {"input": {"text": "slow", "steps": 200} | inputs}
    thread = threading.Thread(target=request, args=(url, "PUT", f"/predictions/{identifier}", body))
    thread.start()
    wait_for(lambda: health(url)["status"] == "BUSY")
    return thread


def group_members(group: int) -> list[int]:
    """Return the processes that still run in a process group."""
    return [pid for pid in psutil.pids() if _runs_in(pid, group)]


def _runs_in(pid: int, group: int) -> bool:
    try:
        return os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False  # it ended while we looked
