"""Command-line arguments that several benchmarks share."""

import argparse


def at_least_one(text: str) -> int:
    """Parse an integer above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number
