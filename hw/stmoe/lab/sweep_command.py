# SPDX-License-Identifier: Apache-2.0
"""``stmoe sweep``: every combination of traces, links and parameters that a file names."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stmoe.command_line import CommandError, within
from stmoe_golden.traces import TraceError

__all__ = ["add_sweep_arguments", "sweep_command"]

MAX_WORKERS = 1024


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("file", metavar="FILE.toml", help="what to sweep (docs/sweep.md)")
    parser.add_argument(
        "-o", dest="output", metavar="FILE.jsonl",
        help="results: made, or gone on with; a summary is put beside it as FILE.json "
        "(default: build/sweep/NAME.jsonl)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=within(1, MAX_WORKERS), metavar="N",
        help="local processes (default: as many as there are cores)",
    )  # fmt: skip
    where.add_argument(
        "--scheduler", metavar="ADDRESS", help="a Dask scheduler instead, tcp://host:8786"
    )


class _Bar:
    """A line on standard error that is written over."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int, failures: int) -> None:
        if self.first is None:
            self.first = done
        width = 30
        filled = width * done // max(1, total)
        text = f"sweep: [{'#' * filled}{'.' * (width - filled)}] {done} of {total} pieces"
        new = done - self.first
        if new and done < total:
            left = (time.monotonic() - self.began) / new * (total - done)
            text += f", about {left:.0f} s left"
        if failures:
            text += f", {failures} failed"
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def sweep_command(options: argparse.Namespace, write: Callable[[str], None]) -> int:
    """Run the command; 0, or 1 where a point could not be computed.

    Raises
    ------
    CommandError
        Bad input, in one line.
    """
    from stmoe_golden.compare import available_cores
    from stmoe_golden.sweep import (
        SweepError,
        load_sweep,
        results_table,
        run_sweep,
        write_summary,
    )

    workers = options.workers or available_cores()
    output = options.output or Path("build/sweep") / (Path(options.file).stem + ".jsonl")
    if Path(output).suffix == ".json":
        raise CommandError(
            "argument -o: must not end in .json, where the summary is put; .jsonl is usual"
        )
    shown = sys.stderr.isatty()
    try:
        sweep = load_sweep(options.file)
        result = run_sweep(
            sweep,
            output,
            workers=workers,
            scheduler=options.scheduler,
            progress=_Bar() if shown else None,
        )
        summary = write_summary(result, output)
    except (SweepError, TraceError) as error:
        raise CommandError(str(error)) from None
    finally:
        if shown:
            sys.stderr.write("\r\033[K")
    if options.json:
        write(json.dumps(result, allow_nan=False) + "\n")
    else:
        write(results_table(result) + f"results in {output}, all points in {summary}\n")
    return int(bool(result["errors"]))
