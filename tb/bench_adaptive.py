# SPDX-License-Identifier: Apache-2.0
"""`make bench BENCH_ARGS=adaptive`: the adaptive gate against the best static threshold.

The best is found with hindsight, for each load ratio and quota; the adaptive gate is told nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from simulation import GPT_OSS, IN_REPO
from stmoe_golden.config import EngineConfig
from stmoe_golden.machine import machine_for_ratio
from stmoe_golden.policies.ours import Ours
from stmoe_golden.timing import simulate
from stmoe_golden.traces import Trace, config_for, load_trace

__all__ = ["figures"]

TRACES = {
    "in-repo trace": (IN_REPO, 7658),
    "gpt_oss_20b trace, 12,000 tokens": (GPT_OSS, 12_000),
}
RATIOS = (0.5, 1.0, 2.0, 4.0)
QUOTAS = (4, 8)
THRESHOLDS = (-2000, -200, -140, -100, -87, -60, -40, -20, 0, 30, 60, 120)
NEVER = 2000
"""A threshold that no score passes."""
COMMAND = "make bench BENCH_ARGS=adaptive"


def _run(trace: Trace, config: EngineConfig, load_ratio: float) -> tuple[float, float]:
    """Time relative to pure compute, and loads for each needed expert."""
    result = simulate(trace, config, machine_for_ratio(config, load_ratio), Ours(config))
    return result.time, result.loads / result.needed


def figures() -> Iterator[tuple[str, str, str, bool, str]]:
    """The worst of all load ratios and quotas, for each trace."""
    for name, (path, tokens) in TRACES.items():
        if not path.exists():
            continue
        trace = load_trace(path).head(tokens)
        time, loads, gain = 0.0, 0.0, 0.0
        for quota in QUOTAS:
            config = config_for(trace).replace(quota=quota)
            static = config.replace(adaptive=False)
            for load_ratio in RATIOS:
                ours = _run(trace, config.replace(adaptive=True), load_ratio)
                tried: dict[Any, tuple[float, float]] = {
                    t: _run(trace, static.replace(threshold=t), load_ratio) for t in THRESHOLDS
                }
                best = min(tried.values())
                none = _run(trace, static.replace(threshold=NEVER), load_ratio)
                time = max(time, ours[0] / best[0])
                loads = max(loads, ours[1] / best[1])
                gain = max(gain, ours[0] / none[0])
        what = f"adaptive gate, {name}, worst of r = 0.5, 1, 2, 4 and quota 4, 8: "
        yield what + "time over the best static", f"{time:.4f}", "1.03", time <= 1.03, COMMAND
        yield what + "bytes over the best static's", f"{loads:.3f}", "1.10", loads <= 1.1, COMMAND
        yield what + "time over no prefetch's", f"{gain:.4f}", "1", gain <= 1, COMMAND
