# SPDX-License-Identifier: Apache-2.0
"""The command line of ``stmoe board``; imports nothing that takes time."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from stmoe.command_line import within
from stmoe.harness.board_protocol import DEFAULT_BAUD
from stmoe_golden.config import FRACTION_BITS

__all__ = ["add_board_commands"]


def add_board_commands(
    commands: Any, number: Callable[[str], int], presets: str, settings: Callable[[Any], None]
) -> None:
    """Add ``replay`` and ``info`` to a parser of subcommands."""

    def seconds(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0.1 <= value <= 3600:
            raise argparse.ArgumentTypeError(f"must be 0.1 to 3600 seconds, not {text!r}")
        return value

    def ratio(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0.01 <= value <= 100:
            raise argparse.ArgumentTypeError(f"must be 0.01 to 100, not {text!r}")
        return value

    def quarters(text: str) -> float:
        try:
            value = float(text)
            if value * (1 << FRACTION_BITS) % 1 == 0 and abs(value) <= 8192:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(
            f"must be -8192 to 8192 units in steps of 0.25, not {text!r}"
        )

    def command(name: str, text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        parser.add_argument("--port", required=True, metavar="PORT", help="such as /dev/ttyUSB1")
        parser.add_argument(
            "--baud",
            type=within(300, 12_000_000),
            default=DEFAULT_BAUD,
            metavar="N",
            help=f"the board's speed, {DEFAULT_BAUD} by default",
        )
        parser.add_argument(
            "--timeout",
            type=seconds,
            default=5.0,
            metavar="S",
            help="seconds of silence after which the board is given up, 5 by default",
        )
        parser.add_argument("--json", action="store_true", help="print one line of JSON")
        return parser

    play = command("replay", "Replay a trace on a board, and hold it to the golden model.")
    play.add_argument("trace", metavar="TRACE", help="an .npz routing trace")
    which = play.add_mutually_exclusive_group()
    which.add_argument(
        "--preset", metavar="NAME", help=f"{presets}; by default what the board says it is"
    )
    which.add_argument("--config", metavar="FILE.toml", help="as `stmoe config` writes it")
    settings(play)
    play.add_argument("--tokens", type=number, metavar="N", help="the first N tokens")
    play.add_argument(
        "--load-ratio",
        type=ratio,
        default=1.0,
        metavar="R",
        help="time to load K experts over the compute time of a layer, 1 by default",
    )
    play.add_argument(
        "--latency",
        type=within(1, (1 << 24) - 1),
        default=32,
        metavar="N",
        help="cycles from a burst's address to its first beat, 32 by default",
    )
    play.add_argument(
        "--seed",
        type=within(0, (1 << 32) - 1),
        default=0,
        metavar="N",
        help="of random stalls of grants and releases; 0, the default, for none",
    )
    play.add_argument(
        "--threshold", type=quarters, metavar="T", help="of the confidence gate, in units"
    )
    play.add_argument(
        "--quota", type=within(0, 256), metavar="N", help="slots that each layer keeps"
    )
    command("info", "Say what a board is; ends what it was doing.")
