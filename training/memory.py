"""Giving memory back."""

import gc

import torch


def free_memory() -> None:
    """Give what was dropped back to the device and to the system, cycles included (accelerate makes some)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
