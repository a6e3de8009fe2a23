"""Whether the Hugging Face Hub may be asked: libraries are kept from it, and users can forbid downloads."""

import os
import sys

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
QUIET = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_UPDATE_CHECK")

_offline_by_us = False
"""Whether HF_HUB_OFFLINE is go_offline's, not the user's."""


def forbidden() -> bool:
    """Return whether the user forbids downloads: HF_HUB_OFFLINE, other than by go_offline."""
    return _is_offline() and not _offline_by_us


def go_offline() -> None:
    """Forbid the Hugging Face libraries the network and telemetry; before diffusers or transformers comes in.

    They read these variables when they are imported; huggingface_hub may be there already, through a
    download, and is told as well. Downloads of lib/ are not theirs, and stay possible.
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
