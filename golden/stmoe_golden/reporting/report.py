# SPDX-License-Identifier: Apache-2.0
"""Makes a report: ``index.html`` and, of a single run, ``timeline.json`` in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..traces import replacing
from .figures import Cell, figures_of
from .page import page
from .study import (
    DEFAULT_POLICIES,
    ReportError,
    Study,
    read_result,
    result_kind,
    study_of_compare,
    study_of_sim,
)
from .svg_chart import number
from .sweep_report import sweep_page
from .trace_events import trace_events, trace_events_json

__all__ = ["DEFAULT_SPANS", "Report", "ReportError", "make_report"]

DEFAULT_SPANS = 16_000
"""Spans of a timeline: a few hundred tokens, and a file of 2 to 4 MB."""


@dataclass(frozen=True)
class Report:
    """What has been written."""

    page: Path
    timeline: Path | None
    figures: int
    notes: list[str]


def make_report(
    result: str | Path,
    folder: str | Path,
    *,
    policies: Sequence[str] = DEFAULT_POLICIES,
    spans: int = DEFAULT_SPANS,
) -> Report:
    """Make the report of a result file.

    Parameters
    ----------
    result
        ``build/sim/report.json`` of ``make sim``, the output of ``stmoe compare --json``, or that
        of ``stmoe sweep`` (its results file, or ``--json``).
    folder
        Made if it is not there. Files take the place of older ones only once they are whole; a
        ``timeline.json`` of an older report is removed where this one has none.
    policies : sequence of str
        Timed for a report of ``make sim``.
    spans : int
        Most spans in ``timeline.json``; 0 for none.

    Raises
    ------
    ReportError, TraceError, TimingError, PolicyError, OSError
        Bad input, in one line; nothing is written then.
    """
    found, kind = _read(result)
    if kind == "sweep":
        text, count, notes = sweep_page(result, found)
        events = None
    else:
        if kind == "sim":
            study = study_of_sim(result, policies=policies, spans=spans)
        else:
            study = study_of_compare(result, spans=spans)
        text, count = study_page(result, study)
        notes = study.notes
        events = _timeline(study)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    timeline = folder / "timeline.json"
    if events is None:
        timeline.unlink(missing_ok=True)
    else:
        with replacing(timeline) as file:
            file.write(events.encode())
    index = folder / "index.html"
    with replacing(index) as file:
        file.write(text.encode())
    return Report(index, None if events is None else timeline, count, notes)


def _read(path: str | Path) -> tuple[dict, str]:
    """The result and its kind. A sweep's results file has one object a line."""
    from ..sweep import SweepError, is_results_file, read_results

    if is_results_file(path):
        try:
            return read_results(path), "sweep"
        except SweepError as error:
            raise ReportError(str(error)) from None
    found = read_result(path)
    return found, result_kind(path, found)


def _timeline(study: Study) -> str | None:
    """The timeline of the engine's own policy, or of the first that has one."""
    for name in ("ours", *study.details):
        result = study.details.get(name)
        if result is not None and result.timeline is not None:
            scale = 1.0 if study.cycle_seconds is None else study.cycle_seconds * 1e6
            return trace_events_json(trace_events(result, microseconds_per_cycle=scale))
    return None


# The page of one run -------------------------------------------------------------------------


def _verdict(study: Study) -> list[str]:
    """What prefetching gives here, in a sentence or two."""
    ours, lru, oracle = (study.row(name) for name in ("ours", "lru", "oracle"))
    said = []
    if ours is not None and lru is not None:
        change = 1 - ours["time"] / lru["time"]
        text = (
            f"With this engine a token takes {number(ours['time'])} times its pure compute; with "
            f"LRU alone it takes {number(lru['time'])}. "
        )
        if change > 0:
            text += f"Prefetching saves {change:.1%} of the time here"
        else:
            text += f"Prefetching does not pay here: it costs {-change:.1%}"
        if oracle is not None and lru["time"] > oracle["time"]:
            share = (lru["time"] - ours["time"]) / (lru["time"] - oracle["time"])
            text += (
                f", {share:.0%} of what perfect knowledge of the next layer would save"
                if change > 0
                else ""
            )
        if lru["bytes"]:
            text += f"; it loads {ours['bytes'] / lru['bytes']:.2f} times the bytes"
        said.append(text + ".")
    elif study.rows:
        best = min(study.rows, key=lambda row: row["time"])
        said.append(
            f"Fastest is {best['policy']}: a token takes {number(best['time'])} times its pure "
            f"compute."
        )
    if study.rtl is not None:
        if study.rtl.get("match"):
            said.append(
                f"The RTL agreed with the golden model in all "
                f"{study.rtl.get('events', 0):,} events and {len(study.rtl['counters'])} counters."
            )
        else:
            first = str(study.rtl.get("failure", "see report.json")).splitlines()[0]
            said.append(f"The RTL did NOT agree with the golden model: {first}")
    return said


def _numbers(study: Study) -> list[tuple[str, str]]:
    row = study.row("ours") or study.rows[0]
    cards = [
        ("time, units of pure compute", number(row["time"])),
        ("P99 token latency", number(row["p99"])),
        ("experts found resident", f"{row['hit_rate']:.1%}"),
        ("loads per needed expert", number(row["bytes"])),
    ]
    learned = study.predictions.get("learned")
    if learned is not None:
        cards.append((f"coverage at {learned.issue_rate:.2f} K", f"{learned.coverage:.1%}"))
    return cards


def _rtl_tables(study: Study) -> list[tuple[str, str, list[str], list[list[Cell]]]]:
    """The RTL's counters, and how far the timing model is from its cycles."""
    report = study.rtl
    if report is None:
        return []
    rows: list[list[Cell]] = []
    for name, pair in report["counters"].items():
        if isinstance(pair, list) and len(pair) == 2:
            rows.append([name, *pair, "equal" if pair[0] == pair[1] else "DIFFERS"])
    return [
        (
            "Counters of the RTL, all tokens (counts)",
            "Every counter read over AXI4-Lite at the end of the run, and the golden model's.",
            ["counter", "RTL", "golden", ""],
            rows,
        )
    ]


def study_page(path: str | Path, study: Study) -> tuple[str, int]:
    """The page of one run, and how many figures it has."""
    figures = figures_of(study)
    name = study.trace.path.name if study.trace is not None and study.trace.path else "a run"
    notes = [*(_sentence(text) for text in study.guardrails), *study.notes]
    facts = list(study.facts)
    ours = study.details.get("ours")
    cycles = study.rtl.get("cycles") if study.rtl is not None else None
    if ours is not None and isinstance(cycles, int) and cycles:
        facts.append(
            ("RTL against model", f"{cycles:,} cycles in the RTL, {ours.total_cycles:,} in the "
             f"timing model ({ours.total_cycles / cycles - 1:+.2%}), random stalls of "
             f"SEED={study.rtl.get('seed') if study.rtl else None}")
        )  # fmt: skip
    facts += [
        ("policy " + row["policy"], str(row["note"])) for row in study.rows if row.get("note")
    ]
    text = page(
        title=f"Expert prefetching report: {name}",
        verdict=_verdict(study),
        numbers=_numbers(study),
        notes=notes,
        facts=facts,
        figures=figures,
        tables=_rtl_tables(study),
        footer=f"Made by stmoe report from {path}. What each metric means: docs/report.md and "
        f"docs/compare.md of the project.",
    )
    return text, len(figures)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
