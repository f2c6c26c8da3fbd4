# SPDX-License-Identifier: Apache-2.0
"""``stmoe report``: one HTML page of a run, a comparison or a sweep."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from stmoe.command_line import CommandError, within
from stmoe_golden.traces import TraceError

from .compare_command import policy_names

__all__ = ["add_report_arguments", "report_command"]

DEFAULT_RESULT = "build/sim/report.json"
DEFAULT_FOLDER = "build/report"
MAX_SPANS = 2_000_000


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "result",
        metavar="RESULT",
        nargs="?",
        default=DEFAULT_RESULT,
        help=f"report.json of make sim, the output of stmoe compare --json or of stmoe sweep "
        f"(default {DEFAULT_RESULT})",
    )
    parser.add_argument(
        "-o", dest="output", metavar="FOLDER", default=DEFAULT_FOLDER,
        help=f"gets index.html and timeline.json (default {DEFAULT_FOLDER})",
    )  # fmt: skip
    parser.add_argument(
        "--policies", metavar="A,B,...", help="rows of a report of make sim, which times none"
    )
    parser.add_argument(
        "--spans", type=within(0, MAX_SPANS), metavar="N",
        help="most spans of timeline.json (default 16000)",
    )  # fmt: skip


def report_command(options: argparse.Namespace, write: Callable[[str], None]) -> None:
    """Run the command.

    Raises
    ------
    CommandError
        Bad input, in one line; nothing has been written.
    """
    from stmoe_golden.policies.registry import PolicyError
    from stmoe_golden.reporting.study import DEFAULT_POLICIES, ReportError

    policies = list(DEFAULT_POLICIES)
    if options.policies is not None:
        policies = policy_names(options.policies)
    from stmoe_golden.reporting.report import DEFAULT_SPANS, make_report
    from stmoe_golden.timing import TimingError

    spans = DEFAULT_SPANS if options.spans is None else options.spans
    try:
        report = make_report(options.result, options.output, policies=policies, spans=spans)
    except (ReportError, TraceError, TimingError, PolicyError) as error:
        text = str(error)
        if options.result == DEFAULT_RESULT and "No such file" in text:
            text += "; make sim writes it"
        raise CommandError(text) from None
    lines = [f"report: {note}" for note in report.notes]
    lines.append(f"report: {report.figures} figures in {report.page}")
    if report.timeline is not None:
        lines.append(f"report: timeline in {report.timeline} (open it in ui.perfetto.dev)")
    write("\n".join(lines) + "\n")
