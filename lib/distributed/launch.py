"""torchrun from within: the processes of one clip, and what their ends mean for the command."""

import logging
import os
import signal
import sys
import uuid

from lib.commands.common import FAILED, INTERRUPTED, MISUSED

SHUTDOWN_SECONDS = 10


def launch(arguments: list[str], *, processes: int) -> int:
    """Run `python -m lib.parallel` with these arguments in so many processes; the exit status.

    That of the first process, which says what is wrong with the request; 1 where one was lost.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "lib.commands.parallel", *arguments)
    except ChildFailedError as error:
        return _status(error.failures)
    except (SignalException, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


def _status(failures: dict) -> int:
    """1 and who was killed, if anyone was; otherwise what the first process ended with."""
    killed = {
        rank: -failure.exitcode
        for rank, failure in sorted(failures.items())
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM  # by which all are ended then
    }
    for rank, number in killed.items():
        name = signal.Signals(number).name
        print(f"process {rank + 1} was killed by signal {number} ({name})", file=sys.stderr)
    first = failures.get(0)
    if not killed and first is not None and first.exitcode in (MISUSED, INTERRUPTED):
        return first.exitcode
    return FAILED
