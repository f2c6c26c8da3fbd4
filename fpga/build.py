# SPDX-License-Identifier: Apache-2.0
"""Builds the board top for a board: what `make bitstream` and `make boards` run.

``python -m fpga.build bitstream --board NAME [--preset NAME] [--clock MHZ] [--seed N]``,
``python -m fpga.build boards``, ``python -m fpga.build measure [PRESET ...]``; in the
repository's root.

Status 0: the bitstream is made and meets timing. 1: timing fails, or a tool does. 2: bad input, or
a preset that does not fit. 3: the project is complete, but what makes the bitstream is not
installed here. Every status but 0 comes with one line on standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from fpga import flow_ecp5, flow_series7
from fpga.board import Board, BoardError, all_boards, board_named
from fpga.flow import DoesNotFit, Job, NoBitstream, TimingFailed
from fpga.tools import ToolFailed, find
from fpga.use import Use
from stmoe_golden.config import PRESETS, ConfigError, preset

__all__ = ["MEASURED", "main", "measured"]

FAILED, BAD_INPUT, NO_BITSTREAM, INTERRUPTED = 1, 2, 3, 130

FLOWS: dict[str, ModuleType] = {"ecp5": flow_ecp5, "series7": flow_series7}
WAYS = {
    "ecp5": "Yosys, nextpnr-ecp5, ecppack (pip)",
    "series7": "Vivado; without it a project",
}

MEASURED = Path(__file__).with_name("measured.json")
"""What the board top takes with each preset, by Yosys's count: `python -m fpga.build measure`."""


class _Parser(argparse.ArgumentParser):
    """Reports a usage error like every other error."""

    def error(self, message: str) -> NoReturn:
        raise BoardError(message)


def _hertz(text: str) -> int:
    try:
        value = Fraction(text) * 1_000_000
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value < 1 or value.denominator != 1:
        raise argparse.ArgumentTypeError(f"must be a frequency in MHz, not {text!r}")
    return int(value)


def _seed(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(
            f"must be an integer from 1 to {(1 << 31) - 1}, not {text!r}"
        )
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m fpga.build", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bitstream = commands.add_parser("bitstream", help="make a bitstream", allow_abbrev=False)
    bitstream.add_argument("--board", default="", metavar="NAME")
    bitstream.add_argument("--preset", metavar="NAME", help="by default the board's own")
    bitstream.add_argument("--clock", type=_hertz, metavar="MHZ", help="by default the board's own")
    bitstream.add_argument("--seed", type=_seed, default=1, help="of place and route")
    bitstream.add_argument("--build-dir", type=Path, default=Path("build/fpga"), metavar="DIR")
    commands.add_parser("boards", help="print the boards", allow_abbrev=False)
    measure = commands.add_parser("measure", help="write measured.json", allow_abbrev=False)
    measure.add_argument("presets", nargs="*", metavar="PRESET", help="by default all")
    return parser


# What is known of each preset ---------------------------------------------------------------------


def measured(family: str) -> dict[str, Use]:
    """What the board top takes on a family with each preset that was measured."""
    rows = json.loads(MEASURED.read_text())["rows"] if MEASURED.is_file() else []
    fields = [f.name for f in dataclasses.fields(Use)]
    return {
        row["preset"]: Use(**{name: row[name] for name in fields})
        for row in rows
        if row["family"] == family
    }


def _measure(names: list[str]) -> None:
    """Synthesise presets for each family, and put what they take into :data:`MEASURED`."""
    for name in names:
        preset(name)  # a wrong name is said before minutes have gone
    families = {board.family: board for board in reversed(all_boards().values())}
    for family, board in families.items():
        for name in names or list(PRESETS):
            config = PRESETS[name]
            # The largest of the family decides what is not worth a try.
            largest = max(
                (b for b in all_boards().values() if b.family == family),
                key=lambda b: b.capacity.block_rams,
            )
            try:
                largest.check_tables(name, config)
            except BoardError as error:
                print(f"measure: left out: {error}", flush=True)
                continue
            folder = Path("build/fpga/measure") / f"{family}-{name}"
            job = Job(board, name, config, board.clock_hz, 1, folder)
            result = FLOWS[family].synthesise(job)
            use = result if isinstance(result, Use) else result[0]
            print(f"measure: {family} {name}\n{use.table(largest)}", flush=True)
            kept = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {"rows": []}
            row = {"family": family, "preset": name, **use.as_dict()}
            row["yosys"] = job.report["tools"]["yosys"]
            others = [r for r in kept["rows"] if (r["family"], r["preset"]) != (family, name)]
            order = list(PRESETS)
            kept["rows"] = sorted(
                [*others, row], key=lambda r: (r["family"], order.index(r["preset"]))
            )
            rows = ",\n".join(f"    {json.dumps(r)}" for r in kept["rows"])
            MEASURED.write_text(f'{{\n  "rows": [\n{rows}\n  ]\n}}\n')


# Commands -----------------------------------------------------------------------------------------


def _cells(board: Board) -> list[str]:
    have, flow = board.capacity, FLOWS[board.family]
    use = measured(board.family).get(board.default_preset)
    rows = use.rows(board) if use else []
    shares = {name: f"{used / available:.0%}" for name, used, available in rows}
    lut, _, block, _ = Use(luts=0, registers=0, block_rams=0, multipliers=0).rows(board)
    found = []
    for name in flow.TOOLS:
        tool = find(name)
        found.append(f"{name} ({tool.origin})" if tool else f"no {name}")
    return [
        board.name,
        board.part,
        f"{board.clock_hz / 1e6:g} MHz",
        board.default_preset,
        f"{have.luts:,} {lut[0]}" + (f" ({shares[lut[0]]})" if rows else ""),
        f"{have.block_rams} {block[0]}" + (f" ({shares[block[0]]})" if rows else ""),
        WAYS[board.family],
        ", ".join(found),
    ]


def _boards() -> None:
    head = ["BOARD", "part", "clock", "PRESET", "LUTs (used)", "block RAM (used)", "flow", "here"]
    table = [head, *(_cells(board) for board in all_boards().values())]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _bitstream(options: argparse.Namespace) -> None:
    board = board_named(options.board)
    name = options.preset or board.default_preset
    config = preset(name)
    clock_hz = options.clock or board.clock_hz
    board.check_clock(clock_hz)
    board.check_tables(name, config)
    start = time.monotonic()
    job = Job(board, name, config, clock_hz, options.seed, options.build_dir / board.name)
    print(
        f"bitstream: {board.title} ({board.part}), preset {name} at {clock_hz / 1e6:g} MHz",
        flush=True,
    )
    if name in board.slow_presets:
        print(
            f"bitstream: {name} fits by count, but has not been placed and routed for "
            f"{board.name} in ten minutes; {board.default_preset} has",
            flush=True,
        )
    try:
        FLOWS[board.family].build(job)
    finally:
        job.report["wall_seconds"] = round(time.monotonic() - start, 1)
        job.write_report()
    print(
        f"bitstream: {job.bitstream} ({job.bitstream.stat().st_size:,} bytes), "
        f"{time.monotonic() - start:.0f} s in all"
    )


def _run(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    if options.command == "boards":
        _boards()
    elif options.command == "measure":
        _measure(options.presets)
    else:
        _bitstream(options)


def _complain(message: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        print(f"bitstream: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except (BoardError, ConfigError, DoesNotFit) as error:
        return _complain(str(error), BAD_INPUT)
    except (TimingFailed, ToolFailed) as error:
        return _complain(str(error), FAILED)
    except NoBitstream as error:
        return _complain(str(error), NO_BITSTREAM)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
