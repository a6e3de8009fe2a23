"""A batch worker, which makes clips by itself: `python -m lib.batch.worker DESCRIPTOR`."""

import os
import sys

from lib.batch.clip import make_clip
from lib.batch.messages import ClipResult, LoadPredictor, MakeClip, PredictorReady, PredictorRefused
from lib.distributed.child_process import connect_to_parent, send
from lib.errors import UserError
from lib.predictors.start import start_video


def main(descriptor: int) -> None:
    """Make one clip after the other until the parent is gone."""
    connection, inbox = connect_to_parent(descriptor)
    load: LoadPredictor = inbox.get()
    try:
        predictor = start_video(load.task)
    except UserError as error:
        return send(connection, PredictorRefused(error=str(error)))
    send(connection, PredictorReady())
    while True:
        clip: MakeClip = inbox.get()
        metrics, problem = {}, ""
        try:
            metrics = dict(make_clip(predictor, clip.inputs, clip.output))
        except UserError as error:
            problem = str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        send(connection, ClipResult(number=clip.number, metrics=metrics, error=problem))


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)
