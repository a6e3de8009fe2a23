"""Weights on their way from the disk while libraries are imported: the system reads, nobody waits."""

import os
import threading
from pathlib import Path

from lib.pipelines.machine import free_system_bytes

SHARE = 0.5
"""Of free system memory: what is read ahead beyond that might be gone again before it is used."""
BLOCK_BYTES = 64 * 2**20


def read_ahead(folder: Path) -> threading.Thread | None:
    """Ask the system for a checkpoint's weights, in the order in which they are loaded.

    Returns the thread that asks, which ends by itself; None where the system takes no such advice.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    thread = threading.Thread(target=_ask, args=(weight_files(folder),), name="read ahead", daemon=True)
    thread.start()
    return thread


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of all parts, in the order in which they will be read."""
    parts = {"transformer": 0, "vae": 1, "text_encoder": 2}
    files = [file for file in folder.glob("*/*.safetensors") if file.parent.name in parts]
    return sorted(files, key=lambda file: (parts[file.parent.name], file.name))


def _ask(files: list[Path]) -> None:
    free = free_system_bytes()
    left = None if free is None else int(free * SHARE)
    for file in files:
        try:
            with file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                for start in range(0, size, BLOCK_BYTES):
                    if left is not None and left < BLOCK_BYTES:
                        return
                    os.posix_fadvise(opened.fileno(), start, BLOCK_BYTES, os.POSIX_FADV_WILLNEED)
                    left = left - BLOCK_BYTES if left is not None else None
        except OSError:
            return  # loading will say what is wrong
