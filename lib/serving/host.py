"""The process of a local server: coglet, which ends when the process that started it ends.

server.py starts it as `python -P -m lib.serving.host SCRATCH HOST MODE` with a pipe as standard input. The
pipe closes when the parent closes it or dies in any way. Then coglet is asked to stop, what does not stop in
time is killed, and the scratch directory is removed.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

# coglet lets a running prediction finish; after this time its result is not waited for.
GRACE_SECONDS = 10.0


def main(scratch: Path, host: str, mode: str) -> None:
    """Serve until asked to stop. The caller must have made this process the leader of a process group."""
    threading.Thread(target=_stop_with_parent, args=(scratch,), daemon=True).start()
    import coglet  # not at the top: importing it takes a while, in which the parent may end

    training = mode == "train"
    try:
        # As cog.server.http does, which would first import all of cog into this process.
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
