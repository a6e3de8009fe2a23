"""The suite behaves the same whatever the user's environment is set to, and wherever it is started."""

import os
import signal
from collections.abc import MutableMapping

SETTINGS = ("COGVIDEOX_", "HF_", "TRANSFORMERS_")


def pytest_configure() -> None:
    """Runs before any test module is imported and any server inherits the environment.

    One thread each: on a machine with other work, threads that spin for one another take a hundred times
    as long.
    """
    forget_settings(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So a shell starts what it sends to the background, and every process of the tests would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def forget_settings(environment: MutableMapping[str, str]) -> None:
    """Removes what chooses a model, opens a server, or redirects the Hub; tests set what they need.

    GPUs are hidden because the suite compares frames with references that are computed in float32 on the
    CPU; a GPU would compute others in half precision.
    """
    for name in [name for name in environment if name.startswith(SETTINGS)]:
        del environment[name]
    environment["CUDA_VISIBLE_DEVICES"] = ""
