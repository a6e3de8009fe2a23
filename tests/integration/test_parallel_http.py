"""A server whose requests two processes share: its replies, lost processes, cancelled requests, its end."""

import json
import os
import signal
import threading

import numpy as np
import psutil
import pytest

from lib.serving.backend import ServerError
from lib.serving.client import request
from lib.serving.server import Server
from tests.integration.conftest import wait_for
from tests.integration.test_video_http import saved
from tests.serving import wait_until_idle
from tests.video_decoding import decode

QUICK = {"prompt": "a red circle moves right on a black background", "num_inference_steps": 3, "seed": 5}
SLOW = QUICK | {"num_inference_steps": 500}
lines: list[str] = []
"""What the shared server printed."""
TWO = {"COGVIDEOX_PARALLEL": "2", "OMP_NUM_THREADS": "1"}


def workers(server: Server) -> list[psutil.Process]:
    found = psutil.Process(server.backend.process.pid).children(recursive=True)
    return [process for process in found if "lib.distributed.worker" in _command(process)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def server():
    with Server("t2v", environment=TWO, timeout=300, prediction_logs=True, on_log=lines.append) as server:
        yield server


def posted(server: Server, inputs: dict) -> dict:
    wait_until_idle(server.url)
    return json.loads(request(server.url, "POST", "/predictions", {"input": inputs})[1])


@pytest.mark.parametrize(("inputs", "layout"), [({}, "cfg2"), ({"guidance_scale": 1}, "ulysses2")])
def test_two_processes_make_the_video_of_one(server, serve, tmp_path, inputs, layout):
    """test_parallel.py compares what they compute; an encoder may amplify its last bits in any pixel."""
    shared, alone = posted(server, QUICK | inputs), posted(serve("t2v"), QUICK | inputs)
    assert (shared["metrics"]["processes"], shared["metrics"]["parallel"]) == (2, layout)
    assert "processes" not in alone["metrics"]
    clips = [decode(saved(reply, tmp_path)).frames.astype(int) for reply in (shared, alone)]
    assert np.abs(clips[0] - clips[1]).mean() < 2


def works(server: Server) -> None:
    reply = posted(server, QUICK)
    assert reply["status"] == "succeeded", reply["error"]


def slowly(server: Server) -> tuple[threading.Thread, list[dict]]:
    """A long request once it has made some steps, and where its reply will be."""
    wait_until_idle(server.url)
    seen = len(lines)

    def run() -> None:
        replies.append(json.loads(request(server.url, "PUT", "/predictions/slow", {"input": SLOW})[1]))

    replies: list[dict] = []
    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: any("denoising" in line for line in lines[seen:]), seconds=60)
    return thread, replies


def test_a_lost_process_fails_its_request_and_the_next_one_works(server):
    thread, replies = slowly(server)
    os.kill(workers(server)[0].pid, signal.SIGKILL)
    thread.join(60)
    assert replies[0]["status"] == "failed"
    assert replies[0]["error"].endswith(
        "Process 2 of 2 was killed by signal 9 (SIGKILL) while it was making the clip. It is being "
        "restarted; send the request again."
    )
    works(server)


def test_a_process_that_is_lost_between_requests_is_replaced(server):
    wait_until_idle(server.url)
    lost = workers(server)[0]
    lost.kill()
    wait_for(lambda: not lost.is_running() or lost.status() == psutil.STATUS_ZOMBIE)
    works(server)


def test_a_cancelled_request_leaves_the_processes_in_sync(server):
    before = [process.pid for process in workers(server)]
    thread, replies = slowly(server)
    request(server.url, "POST", "/predictions/slow/cancel")
    thread.join(60)
    assert replies[0]["status"] == "canceled"
    works(server)
    assert [process.pid for process in workers(server)] == before


def test_a_wrong_setting_ends_the_start():
    wrong = Server("t2v", environment={"COGVIDEOX_PARALLEL": "cfg3"}, timeout=120)
    with pytest.raises(ServerError, match="COGVIDEOX_PARALLEL=cfg3 is unknown"), wrong:
        pass


@pytest.mark.slow
def test_no_process_outlives_a_server_that_is_killed():
    with Server("t2v", environment=TWO, timeout=300, on_log=lambda line: None) as server:
        family = psutil.Process(server.backend.process.pid).children(recursive=True)
        others = workers(server)
        assert len(others) == 1
        for process in [psutil.Process(server.backend.process.pid), *family]:
            if process not in others:
                process.kill()
        psutil.wait_procs(others, timeout=20)
        assert not any(process.is_running() for process in others)


def test_no_process_outlives_a_server_that_is_stopped(server):
    others = workers(server)
    server.stop()
    assert len(others) == 1
    assert psutil.wait_procs(others, timeout=5)[1] == []
