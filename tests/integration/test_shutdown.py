"""A local server that is stopped in any way ends soon and leaves no process and no file."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lib.serving.client import health, predict
from lib.serving.registry import PROJECT
from lib.serving.server import Server
from lib.storage.scratch import PREFIX
from tests.integration.conftest import group_members, sample_config, start_slowly, wait_for
from tests.serving import wait_until_idle

# A predictor that keeps its results as the video predictors do.
KEEPER = """
import time
from cog import BaseRunner, Input, Path
from lib.storage.scratch import Scratch


class Runner(BaseRunner):
    def setup(self) -> None:
        self.scratch = Scratch()

    def run(
        self,
        text: str = Input(description="what to write", default=""),
        steps: int = Input(description="how long", default=1, ge=1, le=500),
    ) -> Path:
        self.scratch.clear()
        with self.scratch.request() as folder:
            path = folder / "result.txt"
            path.write_text(text)
            for _ in range(steps):
                time.sleep(0.05)
        return path
"""


def send_signal(number: int):
    return lambda server: os.kill(server.backend.process.pid, number)


STOPS = {
    "SIGTERM": send_signal(signal.SIGTERM),
    "SIGINT": send_signal(signal.SIGINT),
    "a closed standard input": lambda server: server.backend.process.stdin.close(),
}


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("way", STOPS)
def test_a_stopped_server_removes_its_results_itself(tmp_path, way, busy):
    # Not the temporary directory that Server would give it, which it always removes.
    kept = tmp_path / "tmp"
    kept.mkdir()
    config = sample_config(tmp_path, KEEPER)
    with Server(config, environment={"TMPDIR": str(kept)}, timeout=60) as server:
        predict(server.url, {"text": "done"})
        wait_until_idle(server.url)
        assert len(list(kept.glob(f"{PREFIX}*/*/result.txt"))) == 1
        thread = start_slowly(server.url, "last", steps=30) if busy else None
        STOPS[way](server)
        server.backend.process.wait(timeout=60)
        if thread:
            thread.join()
        wait_for(lambda: not list(kept.iterdir()))


PARENT = """
import sys
from pathlib import Path
from lib.serving.registry import read_config
from lib.serving.server import Server
server = Server(read_config(Path(sys.argv[1])))
server.start()
print(server.url, server.backend.scratch, server.backend.process.pid, flush=True)
sys.stdin.read()
"""


def test_a_server_dies_with_its_parent(sample):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(sample.file)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with parent:
        url, scratch, pid = parent.stdout.readline().split()
        assert health(url)["status"] == "READY"
        parent.kill()
        wait_for(lambda: health(url) == {})
        wait_for(lambda: not Path(scratch).exists())
        wait_for(lambda: not group_members(int(pid)))


# A client with a server of its own; a signal reaches it in the middle of the prediction.
INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from lib.serving.client import predict
from lib.serving.registry import read_config
from lib.serving.server import Server

def interrupt(line):
    if line == "progress: writing 10/400":
        os.kill(os.getpid(), signal.SIGINT)

with Server(read_config(Path(sys.argv[1])), prediction_logs=True, on_log=interrupt) as server:
    try:
        predict(server.url, {"text": "slow", "steps": 400})
    except KeyboardInterrupt:
        began = time.monotonic()
print("stopped after", time.monotonic() - began)
"""


def test_an_interrupted_client_stops_its_own_server_at_once(sample):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(sample.file)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 3, "the prediction was not cancelled but waited for"


# A client that is interrupted once more while its server takes its time to end.
IMPATIENT = """
import os, signal, sys, threading, time
from pathlib import Path
from lib.serving.client import request, health
from tests.serving import wait_until_idle
from lib.serving.registry import read_config
from lib.serving.server import Server

server = Server(read_config(Path(sys.argv[1])), on_log=lambda line: None)
server.start()
process, scratch = server.backend.process, server.backend.scratch
call = {"input": {"text": "slow", "steps": 400}}
connection = threading.Thread(target=request, args=(server.url, "PUT", "/predictions/a", call), daemon=True)
connection.start()
while health(server.url)["status"] != "BUSY":
    time.sleep(0.05)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
began = time.monotonic()
try:
    server.stop()
except KeyboardInterrupt:
    print("interrupted after", time.monotonic() - began, process.returncode, scratch.exists(), process.pid)
"""


def test_an_interrupt_while_the_server_stops_kills_it_and_is_raised_again(sample):
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, str(sample.file)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    *words, seconds, status, left, pid = done.stdout.split()
    assert words == ["interrupted", "after"], done.stderr
    assert float(seconds) < 8
    assert (int(status), left) == (-signal.SIGKILL, "False")
    assert "did not stop in time" not in done.stderr
    assert group_members(int(pid)) == []
