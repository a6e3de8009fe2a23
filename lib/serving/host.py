"""The process that a local server is: coglet, ending when the process that started it ends.

server.py starts it as `python -P -m lib.serving.host SCRATCH HOST MODE` with a pipe as standard input.
The pipe closes when the parent closes it or dies, however it dies: then coglet is told to stop, what does
not stop in time is killed, and the scratch directory goes.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

# coglet lets a running prediction finish; longer than this nobody waits for its result any more.
GRACE_SECONDS = 10.0


def main(scratch: Path, host: str, mode: str) -> None:
    """Serves until told to stop. Being the leader of a process group of its own is the caller's part."""
    threading.Thread(target=_stop_with_parent, args=(scratch,), daemon=True).start()
    import coglet

    training = mode == "train"
    try:
        # As cog.server.http does, which would first import the whole of cog into this process.
        coglet.server.serve(
            predictor_ref=os.environ["COG_TRAIN_TYPE_STUB" if training else "COG_PREDICT_TYPE_STUB"],
            host=host,
            port=int(os.environ["PORT"]),
            is_train=training,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _stop_with_parent(scratch: Path) -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
