# SPDX-License-Identifier: Apache-2.0
"""`make bench BENCH_ARGS=holdout`: is the default threshold one that holds for unseen sequences?

The sequences of the gpt_oss_20b trace are dealt out to two halves in turn. On each half a
threshold is chosen by a rule; what it gives is measured on the other half, and so is what the
default gives on both. Time and bytes are those of ``bench_compare.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench_compare import BYTES, GAPS, closed
from simulation import GPT_OSS
from stmoe_golden.compare import compare
from stmoe_golden.config import EngineConfig, preset
from stmoe_golden.machine import machine_for_ratio
from stmoe_golden.policies.ours import Ours
from stmoe_golden.timing import simulate
from stmoe_golden.traces import Trace, load_trace

__all__ = ["Half", "figures", "halves"]

COMMAND = "make bench BENCH_ARGS=holdout"
QUOTAS = (8, 4)
THRESHOLDS = range(-103, -69, 3)
KEPT_BACK = 0.01
"""The rule: the lowest threshold that keeps the bytes of all six points below the limit by this
share of it, which is about what two such halves differ by. (The lower the threshold, the shorter
the time.)"""


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """Every other sequence, and those between."""
    even = trace.sequence % 2 == 0
    return trace.take(even), trace.take(~even)


class Half:
    """Half of the sequences, with what LRU and the oracle make of them."""

    def __init__(self, trace: Trace, config: EngineConfig) -> None:
        self.trace = trace
        self.config = config
        self.bounds = {}
        for quota in QUOTAS:
            for ratio in GAPS:
                rows = compare(
                    trace,
                    config.replace(quota=quota),
                    load_ratio=ratio,
                    policies=["lru", "oracle"],
                ).rows
                self.bounds[quota, ratio] = [row.result for row in rows]

    def points(self, threshold: int) -> dict[tuple[int, float], tuple[float, float]]:
        """What :func:`bench_compare.closed` says of a threshold, by quota and load ratio."""
        found = {}
        for (quota, ratio), (lru, oracle) in self.bounds.items():
            config = self.config.replace(quota=quota, threshold=threshold)
            ours = simulate(self.trace, config, machine_for_ratio(config, ratio), Ours(config))
            found[quota, ratio] = closed(ours, lru, oracle)
        return found

    def chosen(self) -> int | None:
        """The threshold that the rule picks."""
        for threshold in THRESHOLDS:
            points = self.points(threshold)
            if all(b <= (1 - KEPT_BACK) * BYTES[r] for (_, r), (_, b) in points.items()):
                return threshold
        return None


def figures() -> Iterator[tuple[str, str, str, bool | None, str]]:
    """(name, value, floor, passed, command) of each figure; none without the trace."""
    if not GPT_OSS.exists():
        return
    config = preset("gpt_oss_20b")
    names = ("even", "odd")
    both = [Half(half, config) for half in halves(load_trace(GPT_OSS))]
    floor = ", ".join(f"{GAPS[r]:.0%}, {BYTES[r]}" for r in GAPS)
    for seen, unseen in ((0, 1), (1, 0)):
        for threshold, how in (
            (both[seen].chosen(), f"chosen on {names[seen]} sequences"),
            (config.threshold, "the default"),
        ):
            name = f"gpt_oss_20b, {names[unseen]} sequences, threshold {threshold}, {how}"
            if threshold is None:
                yield name, "none keeps the bytes", floor, False, COMMAND
                continue
            points = both[unseen].points(threshold)
            for quota in QUOTAS:
                row = {r: point for (q, r), point in points.items() if q == quota}
                yield (
                    f"gap closed and bytes at r = 1, 2, 4: {name}, quota {quota}",
                    ", ".join(f"{gap:.1%} with {loads:.3f}" for gap, loads in row.values()),
                    floor,
                    all(gap >= GAPS[r] and b <= BYTES[r] for r, (gap, b) in row.items()),
                    COMMAND,
                )
