"""A process that makes whole clips: `python -m lib.batch.worker DESCRIPTOR`, for lib/batch/run.py."""

import os
import sys

from lib.batch.messages import Begin, Begun, Made, Make, Refused
from lib.distributed.process import messages, send


def main(descriptor: int) -> None:
    """Make one clip after the other until nobody is left who wants one."""
    connection, told = messages(descriptor)
    from lib.distributed.clip import Metrics, move_to
    from lib.errors import UserError
    from lib.predictors.start import start_video

    begin: Begin = told.get()
    try:
        predictor = start_video(begin.task)
    except UserError as error:
        return send(connection, Refused(error=str(error)))
    send(connection, Begun(model=predictor.setup_metrics["model"]))
    while True:
        make: Make = told.get()
        metrics = Metrics()
        try:
            move_to(predictor(metrics, **make.inputs), make.output)
            made = Made(number=make.number, metrics=dict(metrics))
        except UserError as error:
            made = Made(number=make.number, metrics={}, error=str(error))
        except Exception as error:
            made = Made(number=make.number, metrics={}, error=f"{type(error).__name__}: {error}")
        send(connection, made)


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(0)
