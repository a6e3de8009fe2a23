"""Stop work early when another thread asks for it: on a cancel, Ctrl-C or a signal.

What happens on cancel:
1. The client closes the connection or posts /predictions/ID/cancel. coglet raises its CancelationException in
   the thread that runs the predictor. (In commands/ a signal handler sets the event of step 3 directly.)
2. That thread only waits in ComputeThread.run (lib/predictors/compute_thread.py), which
3. sets the request's `stop` event and waits until the compute thread has finished with the request.
4. The compute thread calls check_stop between steps (of denoising, decoding, captioning, downloading), which
   raises Stopped. Context managers remove what was written and detach LoRAs on the way up.
5. ComputeThread.run raises coglet's exception again, and the server reports the request as cancelled.
"""

import threading


class Stopped(Exception):
    """Work ended early because its `stop` event was set."""


def check_stop(stop: threading.Event | None) -> None:
    """Raise Stopped once `stop` is set."""
    if stop is not None and stop.is_set():
        raise Stopped
