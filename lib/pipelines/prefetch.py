"""Reading a checkpoint's weights into the system's file cache while libraries are still being imported."""

import os
import threading
from pathlib import Path

from lib.pipelines.machine import free_system_bytes

SHARE = 0.5
"""Share of free system memory to use: more might be evicted before it is used."""
BLOCK_BYTES = 64 * 2**20


def prefetch(folder: Path) -> threading.Thread | None:
    """Ask the system to read a checkpoint's weights, in the order in which they will be loaded.

    Returns the thread that asks, which ends by itself; None where the system takes no such advice.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    thread = threading.Thread(target=_advise, args=(weight_files(folder),), name="prefetch", daemon=True)
    thread.start()
    return thread


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of all components, in the order in which they will be loaded."""
    order = {"transformer": 0, "vae": 1, "text_encoder": 2}
    files = [file for file in folder.glob("*/*.safetensors") if file.parent.name in order]
    return sorted(files, key=lambda file: (order[file.parent.name], file.name))


def _advise(files: list[Path]) -> None:
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
            return  # loading reports what is wrong
