# SPDX-License-Identifier: Apache-2.0
"""The figures of a report: each a chart, one sentence that says what it shows, and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .pareto import pareto_front
from .study import ISSUE_RATE, Study, rtl_latency
from .svg_chart import (
    Area,
    Axis,
    Bar,
    Line,
    Point,
    area_chart,
    bar_chart,
    heat_map,
    line_chart,
    number,
    point_chart,
)

__all__ = ["Figure", "figures_of", "policy_colour"]

Cell = str | float | int | None
BINS = 240
"""Most points of a figure over time; each is the mean of the tokens in it."""
CURVE_ROWS = 12
"""Rows of a table that stands beside a curve of many points."""


@dataclass(frozen=True)
class Figure:
    """A figure; ``key`` names it in the page, ``legend`` are (name, colour, dashed)."""

    key: str
    title: str
    """With units."""
    sentence: str
    svg: str
    headers: Sequence[str]
    table: Sequence[Sequence[Cell]]
    legend: Sequence[tuple[str, int, bool]] = ()


COLOURS = {
    "ours": 0, "lru": 1, "paper": 2, "oracle": 3, "on_demand": 4, "previous": 5, "belady": 6,
    "lfu": 7, "static": 8, "pregated": 9, "adaptive_gating": 7, "RTL": 6,
}  # fmt: skip


def policy_colour(name: str) -> int:
    """A policy's colour: the same in every figure."""
    return COLOURS.get(name, 8)


def _thinned(count: int, most: int = CURVE_ROWS) -> np.ndarray:
    """At most ``most`` indices of ``count``, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _hidden(study: Study, row: dict[str, Any]) -> float | None:
    """Link time behind compute, relative to pure compute."""
    if isinstance(row.get("hidden"), int | float):
        return float(row["hidden"])
    result = study.details.get(row["policy"])
    return None if result is None else result.hidden


# Prediction ----------------------------------------------------------------------------------


def _accuracy(study: Study) -> Iterator[Figure]:
    learned = study.predictions.get("learned")
    if learned is None:
        return
    recall = learned.per_layer["recall"]
    layers = list(range(len(learned.per_layer["coverage"])))
    names = list(recall)
    total = learned.recall
    yield Figure(
        key="accuracy",
        title="Accuracy of the predictor by layer: recall (% of needed experts)",
        sentence=f"Of the K experts that a token needs, {total['1K']:.1%} are among the K that "
        f"score highest before the layer is routed, {total['2K']:.1%} among the best 2K; layers "
        f"at the left, if lower, have less of the token to go by.",
        svg=line_chart(
            [
                Line(f"recall@{name}", layers, recall[name], i, marks=len(layers) <= 64,
                     dashed=i % 2 == 1)
                for i, name in enumerate(names)
            ],
            Axis("layer", 0, max(1, layers[-1])),
            Axis("recall (% of needed experts)", 0, 1),
            percent=True,
        ),
        headers=["layer", *(f"@{name}" for name in names), "coverage", "issue rate"],
        table=[
            ["all", *(total[name] for name in names), learned.coverage, learned.issue_rate],
            *(
                [layer, *(recall[name][layer] for name in names),
                 learned.per_layer["coverage"][layer], learned.per_layer["issue_rate"][layer]]
                for layer in layers
            ),
        ],
        legend=[(f"recall@{name}", i, i % 2 == 1) for i, name in enumerate(names)],
    )  # fmt: skip


PREDICTOR_NAMES = {"learned": "learned (this engine's)", "paper": "paper (CCT + HT)"}


def _coverage(study: Study) -> Iterator[Figure]:
    found = {n: p for n, p in study.predictions.items() if p.curve is not None}
    if not found:
        return
    colours = {"learned": COLOURS["ours"], "paper": COLOURS["paper"]}
    lines, marks, said = [], [], []
    table: list[list[Cell]] = []
    for name, result in found.items():
        curve = result.curve
        assert curve is not None
        lines.append(
            Line(
                PREDICTOR_NAMES[name],
                curve["issue_rate"],
                curve["coverage"],
                colours[name],
                marks=name == "paper",
                dashed=name == "paper",
            )  # fmt: skip
        )
        at = (result.issue_rate, result.coverage)
        text = f"{name}, threshold {number(result.threshold)}: {at[1]:.1%} at {number(at[0])} K"
        marks.append((*at, colours[name], text))
        said.append(f"{name} {result.coverage:.1%} at {result.issue_rate:.2f} K")
        table.append([name, result.threshold, at[0], at[1], "picked on the warm-up"])
        for i in _thinned(len(curve["threshold"])):
            table.append(
                [name, curve["threshold"][i], curve["issue_rate"][i], curve["coverage"][i], ""]
            )
    most = max(max(line.x) for line in lines)
    yield Figure(
        key="coverage",
        title="Coverage against issue rate: coverage (% of needed experts), issue rate (units of "
        "K experts)",
        sentence=f"How much of what is needed is in the set that is prefetched, for every static "
        f"threshold; further up at the same issue rate is better. At the thresholds picked on the "
        f"warm-up for {ISSUE_RATE:g} K (rings): {', '.join(said)}.",
        svg=line_chart(
            lines,
            Axis("issue rate: experts prefetched per layer, in units of K", 0, min(4.0, most))
            if most <= 4
            else Axis("issue rate: experts prefetched per layer, in units of K", 0, most),
            Axis("coverage (% of needed experts)", 0, 1),
            percent=True,
            marks=marks,
        ),
        headers=["predictor", "threshold", "issue rate (K)", "coverage", ""],
        table=table,
        legend=[(line.name, line.colour, line.dashed) for line in lines],
    )


# Time ----------------------------------------------------------------------------------------


def _time(study: Study) -> Iterator[Figure]:
    bars, table = [], []
    for row in study.rows:
        hidden = _hidden(study, row)
        stall = row.get("stall_share")
        waits = row["time"] * stall if isinstance(stall, int | float) else row["time"] - 1
        compute = row["time"] - waits
        bars.append(
            Bar(
                row["policy"],
                [("compute", compute, 0), ("stall", waits, 1)],
                [("loading hidden behind compute", hidden, 2)] if hidden is not None else [],
            )
        )
        table.append([row["policy"], row["time"], compute, waits, hidden])
    best = min(study.rows, key=lambda row: row["time"])
    yield Figure(
        key="time",
        title="Where the time goes: time per token (units of pure compute)",
        sentence=f"Compute and stall add up to a policy's time, {best['policy']} being the fastest "
        f"here at {number(best['time'])}; the thin bar is link time that runs behind compute and "
        f"costs nothing.",
        svg=bar_chart(bars, Axis("time, relative to pure compute", 0), level=1.0),
        headers=["policy", "time", "compute", "stall", "hidden"],
        table=table,
        legend=[("compute", 0, False), ("stall", 1, False), ("hidden behind compute", 2, False)],
    )


def _stall_by_layer(study: Study) -> Iterator[Figure]:
    shown = {n: r for n, r in study.details.items() if n in ("ours", "lru", "paper", "oracle")}
    if not shown:
        return
    layers = list(range(len(next(iter(shown.values())).per_layer["hits"])))
    waits = {
        name: (result.per_layer["stall_cycles"] / result.compute_cycles * len(layers)).tolist()
        for name, result in shown.items()
    }
    worst = {name: int(np.argmax(values)) for name, values in waits.items()}
    first = next(iter(shown))
    yield Figure(
        key="stall",
        title="Waiting by layer: stall (units of a layer's pure compute)",
        sentence=f"How long each layer waits for experts that are not there: {first} waits longest "
        f"in layer {worst[first]}, {number(waits[first][worst[first]])} of a layer's compute.",
        svg=line_chart(
            [
                Line(name, layers, values, policy_colour(name), marks=len(layers) <= 64,
                     dashed=name != "ours")
                for name, values in waits.items()
            ],
            Axis("layer", 0, max(1, layers[-1])),
            Axis("stall (units of a layer's compute)", 0),
        ),
        headers=["layer", *waits],
        table=[[layer, *(values[layer] for values in waits.values())] for layer in layers],
        legend=[(name, policy_colour(name), name != "ours") for name in waits],
    )  # fmt: skip


def _latency(study: Study) -> Iterator[Figure]:
    spread: dict[str, np.ndarray] = {}
    for name, result in study.details.items():
        spread[name] = result.latency / (result.compute_cycles / result.tokens_measured)
    rtl = rtl_latency(study.rtl) if study.rtl is not None else None
    if rtl is not None and spread:
        result = next(iter(study.details.values()))
        spread["RTL"] = rtl[-result.tokens_measured :] / (
            result.compute_cycles / result.tokens_measured
        )
    if not spread:
        return
    lines, table = [], []
    lowest = 1.0
    for name, values in spread.items():
        ordered = np.sort(values)
        # Share of tokens that take longer: 1 before the first, 1/n just before the last.
        slower = 1.0 - np.arange(len(ordered)) / len(ordered)
        lowest = min(lowest, float(slower[-1]))
        index = np.unique(
            np.concatenate(
                [
                    _thinned(len(ordered), BINS),
                    len(ordered) - 1 - np.arange(min(len(ordered), 100)),
                ]
            )
        )
        lines.append(
            Line(
                name,
                ordered[index].tolist(),
                slower[index].tolist(),
                policy_colour(name),
                dashed=name != "ours",
                steps=True,
            )  # fmt: skip
        )
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        table.append([name, values.mean(), p50, p90, p99, values.max()])
    known = {row[0] for row in table}
    for row in study.rows:
        if row["policy"] not in known:
            table.append(
                [row["policy"], row.get("mean"), row["p50"], None, row["p99"], None]
            )  # fmt: skip
    unit = study.cycle_seconds
    compute = ""
    if unit is not None:
        result = next(iter(study.details.values()))
        per_token = result.compute_cycles / result.tokens_measured * unit
        compute = f" One unit is {per_token * 1e3:.3g} ms."
    lead = table[0]
    yield Figure(
        key="latency",
        title="Token latency: share of tokens that take longer (%), latency (units of pure "
        "compute)",
        sentence=f"The further left, the better; where a line crosses the dashed level is its "
        f"P99, {number(float(lead[4] or 0))} for {lead[0]}, the median at 50 %.{compute}",
        svg=line_chart(
            lines,
            Axis("token latency, relative to a token's pure compute"),
            Axis("tokens that take longer (%)", max(lowest, 1e-4), 1, log=True),
            percent=True,
            levels=[(0.01, "P99")] if lowest < 0.01 else [],
        ),
        headers=["policy", "mean", "P50", "P90", "P99", "longest"],
        table=table,
        legend=[(line.name, line.colour, line.dashed) for line in lines],
    )


# Loads ---------------------------------------------------------------------------------------


def _bytes(study: Study) -> Iterator[Figure]:
    trace, size = study.trace, study.expert_bytes
    per_token = None
    if trace is not None and size is not None:
        per_token = trace.num_layers * trace.top_k * size / 1e6
    bars, table = [], []
    for row in study.rows:
        needed = row.get("needed") or 0
        demand = row.get("demand_loads")
        if isinstance(demand, int | float) and needed:
            wanted = min(row["bytes"], demand / needed)
            parts = [("demand", wanted, 1), ("prefetch", row["bytes"] - wanted, 0)]
        else:
            parts = [("loads", row["bytes"], 8)]
        bars.append(Bar(row["policy"], parts))
        table.append(
            [
                row["policy"],
                row["bytes"],
                row["bytes"] * per_token if per_token is not None else None,
                row["hit_rate"],
                *(row[key] / needed if needed else None for key in PREFETCH_FATES),
            ]  # fmt: skip
        )
    few = min(study.rows, key=lambda row: row["bytes"])
    yield Figure(
        key="bytes",
        title="Bytes: loads (per needed expert)",
        sentence=f"What crosses the link for each expert that is used; {few['policy']} needs "
        f"least, {number(few['bytes'])}, and 1 would be every expert loaded anew.",
        svg=bar_chart(bars, Axis("loads per needed expert", 0)),
        headers=["policy", "loads", "MB a token", "hit rate", *PREFETCH_FATES],
        table=table,
        legend=[("demand", 1, False), ("prefetch", 0, False)],
    )


PREFETCH_FATES = ("useful", "late", "useless", "cancelled", "pollution")


def _energy(study: Study) -> Iterator[Figure]:
    names = list(
        dict.fromkeys(
            name
            for row in study.rows
            for name in (row.get("energy") or {"energy": row["energy_j"]})
        )
    )
    most = max(row["energy_j"] for row in study.rows)
    unit, scale = next(
        ((u, s) for u, s in (("J", 1.0), ("mJ", 1e3), ("uJ", 1e6)) if most * s >= 1), ("nJ", 1e9)
    )
    colours = {name: 9 if name == "table" else 4 for name in names}
    bars, table = [], []
    for row in study.rows:
        parts = row.get("energy") or {"energy": row["energy_j"]}
        bars.append(Bar(row["policy"], [(n, parts.get(n, 0.0) * scale, colours[n]) for n in names]))
        table.append(
            [row["policy"], row["energy_j"] * scale, *(parts.get(n, 0.0) * scale for n in names)]
        )
    least = min(study.rows, key=lambda row: row["energy_j"])
    yield Figure(
        key="energy",
        title=f"Energy: loads and predictor tables ({unit} per token)",
        sentence=f"Picojoules per bit of the tier times what was loaded, and the engine's own "
        f"table reads and writes; least is {least['policy']} with "
        f"{number(least['energy_j'] * scale)} {unit}.",
        svg=bar_chart(bars, Axis(f"energy ({unit} per token)", 0)),
        headers=["policy", f"{unit} a token", *names],
        table=table,
        legend=[(_tier(name), colours[name], False) for name in names],
    )


def _tier(name: str) -> str:
    return {"table": "predictor tables", "energy": "all"}.get(name, f"loads from {name}")


# Buffer --------------------------------------------------------------------------------------


def _occupancy(study: Study) -> Iterator[Figure]:
    name = next(
        (n for n in ("ours", *study.details) if n in study.details
         and study.details[n].occupancy is not None), None,
    )  # fmt: skip
    if name is None:
        return
    result = study.details[name]
    assert result.occupancy is not None
    slots = result.machine.slots
    filled = result.occupancy.astype(float)
    filled = np.column_stack([filled, slots - filled.sum(axis=1)])
    edges = np.unique(np.linspace(0, len(filled), min(BINS, len(filled)) + 1).astype(int))
    means = np.add.reduceat(filled, edges[:-1], axis=0) / np.diff(edges)[:, None]
    first = result.tokens - result.tokens_measured
    at = (first + edges[:-1]).tolist()
    kinds = ("used residents", "prefetched, not used yet", "on their way", "free")
    colours = (0, 2, 4, 8)
    mean = filled.mean(axis=0)
    yield Figure(
        key="occupancy",
        title=f"Buffer occupancy over time, policy {name}: slots (of {slots})",
        sentence=f"What the slots hold as each token ends: {number(mean[0], 3)} experts that have "
        f"been used, {number(mean[1], 3)} prefetched and still waiting for their use, "
        f"{number(mean[2], 3)} on their way, on average.",
        svg=area_chart(
            at,
            [
                Area(kind, means[:, i].tolist(), colour)
                for i, (kind, colour) in enumerate(zip(kinds, colours, strict=True))
            ],
            Axis("token of the trace"),
            Axis("slots", 0, float(slots)),
        ),
        headers=["token", *kinds],
        table=[
            ["mean", *mean.tolist()],
            *([at[i], *means[i].tolist()] for i in _thinned(len(at))),
        ],
        legend=[(kind, colour, False) for kind, colour in zip(kinds, colours, strict=True)],
    )


def _heat(study: Study) -> Iterator[Figure]:
    trace = study.trace
    if trace is None:
        return
    layers, experts = trace.num_layers, trace.num_experts
    counts = np.zeros((layers, experts), np.int64)
    for layer in range(layers):
        counts[layer] = np.bincount(trace.experts[:, layer].ravel(), minlength=experts)
    even = trace.num_tokens * trace.top_k / experts
    ratio = counts / even
    quarter = max(1, experts // 4)
    share = np.sort(counts, axis=1)[:, ::-1][:, :quarter].sum(axis=1) / counts.sum(axis=1)
    hottest = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    yield Figure(
        key="experts",
        title="Expert heat map: use of each expert (times an even share)",
        sentence=f"Strong cells are experts used more than an even share (1x); hottest is expert "
        f"{hottest[1]} of layer {hottest[0]}, {number(float(ratio[hottest]), 3)}x, and the busiest "
        f"quarter of a layer's experts takes {share.mean():.0%} of its uses.",
        svg=heat_map(
            ratio.tolist(), "expert", "layer", high=float(min(ratio.max(), max(3.0, np.percentile(
                ratio, 99)))), unit="x",
        ),
        headers=["layer", "hottest expert", "its use (x)", f"busiest {quarter} take", "never used"],
        table=[
            [layer, int(ratio[layer].argmax()), float(ratio[layer].max()), float(share[layer]),
             int((counts[layer] == 0).sum())]
            for layer in range(layers)
        ],
    )  # fmt: skip


def _pareto(study: Study) -> Iterator[Figure]:
    front = set(pareto_front([(row["bytes"], row["time"]) for row in study.rows]))
    points = [
        Point(row["policy"], row["bytes"], row["time"], policy_colour(row["policy"]), i in front)
        for i, row in enumerate(study.rows)
    ]
    best = [study.rows[i]["policy"] for i in sorted(front)]
    yield Figure(
        key="pareto",
        title="Pareto plot: time (units of pure compute) against loads (per needed expert)",
        sentence=f"Left and down is better; on the line, with a ring, are the policies that no "
        f"other beats in both: {', '.join(best)}.",
        svg=point_chart(
            points,
            Axis("loads per needed expert"),
            Axis("time, relative to pure compute"),
        ),
        headers=["policy", "loads", "time", "on the front"],
        table=[
            [row["policy"], row["bytes"], row["time"], "yes" if i in front else ""]
            for i, row in enumerate(study.rows)
        ],
    )


PARTS: tuple[Callable[[Study], Iterator[Figure]], ...] = (
    _time, _latency, _stall_by_layer, _accuracy, _coverage, _bytes, _energy, _pareto, _occupancy,
    _heat,
)  # fmt: skip


def figures_of(study: Study) -> list[Figure]:
    """All figures that the study has the figures for, in the order in which they are read."""
    return [figure for part in PARTS for figure in part(study)]
