"""Keep Hugging Face libraries off the network, and know whether the user forbids downloads."""

import os
import sys

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
QUIET = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_UPDATE_CHECK")

_offline_by_us = False
"""Whether HF_HUB_OFFLINE was set by go_offline, not by the user."""


def forbidden() -> bool:
    """Return whether the user set HF_HUB_OFFLINE, which forbids downloads."""
    return _is_offline() and not _offline_by_us


def go_offline() -> None:
    """Turn off network access and telemetry of the Hugging Face libraries.

    Call it before diffusers or transformers is imported: they read these variables on import. The constants
    of huggingface_hub are changed too, as it may be loaded already. lib's own downloads stay possible.
    """
    global _offline_by_us
    _offline_by_us = _offline_by_us or not _is_offline()
    for name in (*OFFLINE, *QUIET):
        os.environ[name] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"):
            setattr(constants, name, True)


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
