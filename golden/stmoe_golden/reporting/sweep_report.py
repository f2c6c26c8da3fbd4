# SPDX-License-Identifier: Apache-2.0
"""The report of a sweep: its two Pareto plots, time against load, and every point in a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import Cell, Figure, policy_colour
from .page import page
from .study import ReportError
from .svg_chart import Axis, Line, Point, line_chart, number, point_chart

__all__ = ["sweep_page"]

MAX_ROWS = 2000
"""Most rows of the table of points; the rest is in the results file."""


def _checked(path: str | Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points; :class:`ReportError` where one is not what ``stmoe sweep`` writes."""
    points = result["points"]
    if not isinstance(points, list) or not points:
        raise ReportError(f"{path}: points must be a list of at least one point that was computed")
    for i, point in enumerate(points):
        try:
            float(point["table_bits"]), float(point["slots"]), point["config"].items()
            float(point["prediction"]["coverage"])
            for row in point["rows"]:
                for key in ("time", "bytes", "p99", "hit_rate", "energy_j"):
                    float(row[key])
                str(row["policy"]), float(point["load_ratio"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(f"{path}: points[{i}] is not a point of a sweep: {error!r}") from None
    return points


def _name(result: Mapping[str, Any], point: Mapping[str, Any], skip: tuple[str, ...]) -> str:
    """What sets a point apart, in a few words."""
    from ..sweep import value_of

    parts = [
        f"{name} {value_of(point, name)}"
        for name in result["varied"]
        if name not in skip and len({value_of(p, name) for p in result["points"]}) > 1
    ]
    return ", ".join(parts)


def _bits(result: Mapping[str, Any], points: list[dict[str, Any]]) -> Figure:
    front = {entry["point"] for entry in result["fronts"]["table_bits"]}
    traces = list(dict.fromkeys((p["trace"], p["tokens"]) for p in points))
    # Points that differ only in what the predictor does not see are one.
    shown: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    for i, p in enumerate(points):
        at = (p["trace"], p["tokens"], p["table_bits"], p["prediction"]["coverage"])
        if at not in shown or i in front:
            shown[at] = (i, p)
    marks, table = [], []
    for i, p in shown.values():
        colour = traces.index((p["trace"], p["tokens"])) % 8
        predictor = ", ".join(
            f"{k} {v}" for k, v in p["config"].items() if k in PREDICTOR and k in result["varied"]
        )
        best = i in front
        marks.append(
            Point(predictor or Path(p["trace"]).stem, p["table_bits"] / 1000,
                  p["prediction"]["coverage"], colour, best, None if best else "")
        )  # fmt: skip
        table.append(
            [predictor or "-", Path(p["trace"]).name, p["table_bits"] / 1000,
             p["prediction"]["coverage"], p["prediction"]["issue_rate"], "yes" if best else ""]
        )  # fmt: skip
    table.sort(key=lambda row: (str(row[1]), row[2], -float(row[3])))
    top = max(marks, key=lambda m: m.y)
    return Figure(
        key="pareto-bits",
        title="Pareto plot: coverage (% of needed experts) against table size (kbit)",
        sentence=f"Left and up is better; ringed points, joined, are those that no smaller table "
        f"matches. Most coverage: {top.y:.1%} with {number(top.x)} kbit.",
        svg=point_chart(
            # A line joins the points of one trace only.
            marks if len(traces) == 1 else [
                Point(m.name, m.x, m.y, m.colour, False, m.text) for m in marks
            ],
            Axis("spatial and temporal tables (kbit)"),
            Axis("coverage (% of needed experts)"),
            percent=True,
        ),
        headers=["predictor", "trace", "kbit", "coverage", "issue rate (K)", "on the front"],
        table=table,
        legend=[(f"{Path(t).name}, {n:,} tokens", i % 8, False)
                for i, (t, n) in enumerate(traces)],
    )  # fmt: skip


PREDICTOR = ("spatial_depth", "weight_bits", "margin_low", "margin_step", "margin_high",
             "lookahead")  # fmt: skip


def _links(points: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(
        (p["trace"], p["tokens"], p["system"] or p["load_ratio"], p["dtype"]) for p in points
    ))  # fmt: skip


def _slots(result: Mapping[str, Any], points: list[dict[str, Any]]) -> list[Figure]:
    figures = []
    for n, link in enumerate(_links(points)):
        front = {
            (f["point"], f["policy"]) for f in result["fronts"]["slots"]
            if (f["trace"], f["tokens"], f["link"], f["dtype"]) == link
        }  # fmt: skip
        marks, table = [], []
        for i, p in enumerate(points):
            if (p["trace"], p["tokens"], p["system"] or p["load_ratio"], p["dtype"]) != link:
                continue
            name = _name(result, p, ("trace", "tokens", "system", "load_ratio", "dtype"))
            for row in p["rows"]:
                best = (i, row["policy"]) in front
                marks.append(
                    Point(f"{row['policy']}: {name}", p["slots"], row["time"],
                          policy_colour(row["policy"]), best, row["policy"] if best else "")
                )  # fmt: skip
                table.append(
                    [row["policy"], name or "-", int(p["slots"]), row["time"],
                     "yes" if best else ""]
                )  # fmt: skip
        table.sort(key=lambda row: (row[2], row[3]))
        least = min(marks, key=lambda m: m.y)
        where = link[2] if isinstance(link[2], str) else f"r = {link[2]:g}"
        figures.append(
            Figure(
                key=f"pareto-slots-{n}",
                title=f"Pareto plot, {Path(link[0]).name}, {where}, {link[3]}: time (units of pure "
                f"compute) against buffer (slots)",
                sentence=f"Left and down is better; ringed points, joined, are those that no "
                f"smaller buffer matches. Least time: {number(least.y)} with "
                f"{number(least.x)} slots ({least.name}).",
                svg=point_chart(
                    marks, Axis("slots of the expert buffer"),
                    Axis("time, relative to pure compute"),
                ),
                headers=["policy", "point", "slots", "time", "on the front"],
                table=table,
                legend=[(name, policy_colour(name), False)
                        for name in dict.fromkeys(row[0] for row in table)],
            )
        )  # fmt: skip
    return figures


MAX_LINK_FIGURES = 12
"""Most plots of slots against time: one for each trace, link and expert type."""


def _load(result: Mapping[str, Any], points: list[dict[str, Any]]) -> list[Figure]:
    """Time against load ratio: the best point of each policy at each ratio, one figure a trace."""
    figures = []
    for n, (trace, tokens) in enumerate(dict.fromkeys((p["trace"], p["tokens"]) for p in points)):
        best: dict[str, dict[float, float]] = {}
        for p in points:
            if (p["trace"], p["tokens"]) == (trace, tokens):
                for row in p["rows"]:
                    times = best.setdefault(row["policy"], {})
                    ratio = float(p["load_ratio"])
                    times[ratio] = min(times.get(ratio, row["time"]), row["time"])
        ratios = sorted({ratio for times in best.values() for ratio in times})
        if len(ratios) < 2:
            continue
        figures.append(
            Figure(
                key=f"load-{n}",
                title=f"Time (units of pure compute) against load ratio r, {Path(trace).name}",
                sentence="The fastest point of each policy at each r, the time to load K experts "
                "over the compute time of a layer: how slow a link still serves.",
                svg=line_chart(
                    [
                        Line(name, sorted(times), [times[r] for r in sorted(times)],
                             policy_colour(name), marks=True, dashed=name != "ours")
                        for name, times in best.items()
                    ],
                    Axis("load ratio r", log=ratios[-1] / ratios[0] > 8),
                    Axis("time, relative to pure compute"),
                ),
                headers=["load ratio r", *best],
                table=[[r, *(times.get(r) for times in best.values())] for r in ratios],
                legend=[(name, policy_colour(name), name != "ours") for name in best],
            )
        )  # fmt: skip
    return figures


def sweep_page(path: str | Path, result: Mapping[str, Any]) -> tuple[str, int, list[str]]:
    """The page of a sweep's summary, how many figures it has, and its notes."""
    points = _checked(path, result)
    for key in ("varied", "errors", "fronts", "sweep"):
        if key not in result:
            raise ReportError(f"{path}: {key} is missing; it must be the result of stmoe sweep")
    slots = _slots(result, points)
    figures = [_bits(result, points), *slots[:MAX_LINK_FIGURES], *_load(result, points)]
    errors = [
        f"{', '.join(f'{k} {v}' for k, v in e.items() if k != 'error' and v not in (None, {}))}: "
        f"{e['error']}"
        for e in result["errors"]
    ]
    notes = []
    if len(slots) > MAX_LINK_FIGURES:
        notes.append(
            f"{len(slots) - MAX_LINK_FIGURES} of {len(slots)} plots of slots against time are "
            f"left out: sweep fewer links at once, or see the table."
        )
    if errors:
        notes.append(f"{len(errors)} points could not be computed; the first: {errors[0]}.")
    from ..sweep import value_of

    varied = list(result["varied"])
    rows: list[list[Cell]] = [
        [*(value_of(p, name) for name in varied), int(p["slots"]), p["table_bits"] / 1000,
         p["prediction"]["coverage"], row["policy"], row["time"], row["p99"], row["hit_rate"],
         row["bytes"], row["energy_j"] * 1e3]
        for p in points for row in p["rows"]
    ]  # fmt: skip
    count = sum(len(p["rows"]) for p in points)
    fastest = min(((row, p) for p in points for row in p["rows"]), key=lambda pair: pair[0]["time"])
    guardrails = list(dict.fromkeys(text for p in points for text in p.get("guardrails", [])))
    text = page(
        title=f"Sweep report: {Path(str(result['sweep'])).name}",
        verdict=[
            f"{len(points):,} points, {count:,} timed runs. Fastest: {fastest[0]['policy']} with "
            f"{number(fastest[0]['time'])} times pure compute "
            f"({_name(result, fastest[1], ()) or 'the only point'})."
        ],
        numbers=[
            ("points", f"{len(points):,}"),
            ("least time", number(fastest[0]["time"])),
            ("most coverage", f"{max(p['prediction']['coverage'] for p in points):.1%}"),
            ("failed points", str(len(errors))),
        ],
        notes=notes + [g[:1].upper() + g[1:] + "." for g in guardrails[:3]],
        facts=[("sweep", str(result["sweep"])), ("code", str(result.get("code", "-"))),
               ("varied", ", ".join(varied))],
        figures=figures,
        tables=[
            (
                "All points",
                "Every point and policy: time, P99 relative to pure compute, loads per needed "
                "expert, energy in mJ per token."
                + (f" The first {MAX_ROWS:,} of {len(rows):,} rows." if len(rows) > MAX_ROWS
                   else ""),
                [*varied, "slots", "kbit", "coverage", "policy", "time", "P99", "hit rate",
                 "loads", "mJ/token"],
                rows[:MAX_ROWS],
            )
        ],
        footer=f"Made by stmoe report from {path}. How sweeps work: docs/sweep.md of the project.",
    )  # fmt: skip
    return text, len(figures), notes
