"""How the scripts read numbers from their command lines."""

import argparse


def seed(text: str) -> int:
    """Reads --seed: a whole number from 0 to 2^63 - 1, as torch's generators take it."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2^63 - 1")
    return int(text)


def at_least_1(text: str) -> int:
    """Reads a number of things."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)
