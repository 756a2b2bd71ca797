"""How the scripts read numbers and paths from their command lines. What cannot be meant is refused, and named."""

import argparse
from pathlib import Path

MOST = 2**31 - 1  # of anything that is counted


def whole(text: str) -> int:
    """Reads a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def at_least_1(text: str) -> int:
    """Reads a number of things: a whole number from 1 to MOST."""
    number = whole(text)
    if not 1 <= number <= MOST:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to {MOST}")
    return number


def seed(text: str) -> int:
    """Reads --seed: a whole number from 0 to 2^63 - 1, as torch's generators take it."""
    number = whole(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2^63 - 1")
    return number


def path(text: str) -> Path:
    """Reads a path. An empty one would be the current folder, and is more likely a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; leave it out, or give a path")
    return Path(text)
