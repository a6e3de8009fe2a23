"""Settings of the test suite: its environment, its marks, and which worker runs which file."""

import os
import signal
from collections.abc import MutableMapping
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

SETTINGS = ("COGVIDEOX_", "HF_", "TRANSFORMERS_")
INTEGRATION = Path(__file__).parent / "integration"
SLOW_SECONDS = 900
"""The timeout of a slow test; pyproject.toml has that of the others."""
SHARED_SERVERS = {
    f"tests/integration/{file}.py": group
    for group, files in {
        "video": (
            "test_video_http", "test_alternating_http", "test_caption_http", "test_lora_http",
            "test_parallel_http",
        ),
        "conversion": ("test_convert_chain", "test_convert_http"),
    }.items()
    for file in files
}  # fmt: skip
"""The group of each file that uses servers with the same settings; a worker starts each server once."""


class Scheduling(LoadFileScheduling):
    """Run a file, and a group of SHARED_SERVERS, on one worker."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return SHARED_SERVERS.get(file, file)


def pytest_xdist_make_scheduler(config, log) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the integration tests, and give slow tests more time."""
    for item in items:
        if INTEGRATION in item.path.parents:
            item.add_marker("integration")
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


def pytest_configure() -> None:
    """Set the environment before a test module is imported and a server inherits it.

    Each process gets one thread: on a busy machine, threads that spin while they wait for each other take
    a hundred times as long.
    """
    forget_settings(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GOMP_SPINCOUNT"] = "1000"  # as in script/_env.sh and the cog*.yaml files
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts background jobs this way, and every process of the tests would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def forget_settings(environment: MutableMapping[str, str]) -> None:
    """Remove the settings of the service and the Hub; tests set what they need.

    GPUs are hidden because the suite compares frames with references computed in float32 on the CPU.
    """
    for name in [name for name in environment if name.startswith(SETTINGS)]:
        del environment[name]
    environment["CUDA_VISIBLE_DEVICES"] = ""
