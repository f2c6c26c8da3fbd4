# SPDX-License-Identifier: Apache-2.0
"""What the commands of ``stmoe`` share: how they say what is wrong; imports nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["CommandError", "within"]


class CommandError(Exception):
    """Something the user gave that cannot be used; its text is the line to print."""


def within(low: int, high: int) -> Callable[[str], int]:
    """The argument type of an integer from ``low`` to ``high``."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {low} to {high}, not {text!r}")
        return value

    return convert
