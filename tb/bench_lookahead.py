# SPDX-License-Identifier: Apache-2.0
"""`make bench BENCH_ARGS=lookahead`: two layers ahead against one, on the timing model."""

from __future__ import annotations

from collections.abc import Iterator

from simulation import GPT_OSS, IN_REPO
from stmoe_golden.machine import machine_for_ratio
from stmoe_golden.policies.ours import Ours
from stmoe_golden.timing import TimedResult, simulate
from stmoe_golden.traces import config_for, load_trace

__all__ = ["figures"]

TOKENS = 6_000
LINKS = ((0.5, 0), (1.0, 0), (2.0, 0), (4.0, 0), (0.5, 16_384))
"""Load ratio, and cycles from an address to its first data; an expert's load takes 1,024 cycles."""
QUOTAS = (4, 8)
WORST_TIME = 1.003
"""What two layers may cost where they do not help."""
COMMAND = "make bench BENCH_ARGS=lookahead"


def figures() -> Iterator[tuple[str, str, str, bool, str]]:
    """Time and bytes with a lookahead of two, over those with one, for each trace and link."""
    for path, name in ((IN_REPO, "in-repo"), (GPT_OSS, "gpt_oss_20b")):
        if not path.exists():
            continue
        trace = load_trace(path)
        shape = config_for(trace).replace(adaptive=True)
        trace = trace.head(TOKENS)
        for load_ratio, latency in LINKS:
            times, loads = [], []
            for quota in QUOTAS:
                one, two = (
                    _timed(trace, shape.replace(quota=quota, lookahead=look), load_ratio, latency)
                    for look in (1, 2)
                )
                times.append(two.time / one.time)
                loads.append(two.loads / one.loads)
            yield (
                f"lookahead 2 over 1, {name}, r = {load_ratio:g}"
                + (f", latency {latency:,} cycles" if latency else "")
                + f", quota {QUOTAS[0]} and {QUOTAS[1]}",
                f"time {times[0]:.4f}, {times[1]:.4f}; loads {loads[0]:.3f}, {loads[1]:.3f}",
                f"time {WORST_TIME}",
                max(times) <= WORST_TIME,
                COMMAND,
            )


def _timed(trace, config, load_ratio: float, latency: int) -> TimedResult:
    machine = machine_for_ratio(config, load_ratio, latency=latency)
    return simulate(trace, config, machine, Ours(config))
