# SPDX-License-Identifier: Apache-2.0
"""`make bench BENCH_ARGS=compare`: the figures of docs/compare.md, with their floors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from simulation import GPT_OSS, IN_REPO
from stmoe_golden.compare import compare
from stmoe_golden.config import preset
from stmoe_golden.machine import machine_for_ratio
from stmoe_golden.policies.belady import Belady
from stmoe_golden.policies.lru import Lru
from stmoe_golden.policies.ours import Ours
from stmoe_golden.timing import TimedResult, simulate
from stmoe_golden.traces import Trace, config_for, load_trace

__all__ = ["BYTES", "GAPS", "closed", "figures", "shuffled"]

COMMAND = "make bench BENCH_ARGS=compare"
RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
GAPS = {1.0: 0.88, 2.0: 0.74, 4.0: 0.70}
BYTES = {1.0: 1.25, 2.0: 1.13, 4.0: 1.13}


def shuffled(trace: Trace, how: str, seed: int = 1) -> Trace:
    """Routing without what a predictor learns from: every set drawn anew (``uniform``), tokens in
    random order (``tokens``), or each layer's tokens in an order of their own (``layers``)."""
    rng = np.random.default_rng(seed)
    tokens, layers, top_k = trace.experts.shape
    if how == "uniform":
        draws = rng.random((tokens, layers, trace.num_experts), dtype=np.float32)
        experts = np.argsort(draws, axis=2)[:, :, :top_k].astype(trace.experts.dtype)
    elif how == "tokens":
        experts = trace.experts[rng.permutation(tokens)]
    elif how == "layers":
        orders = [rng.permutation(tokens) for _ in range(layers)]
        experts = np.stack([trace.experts[o, i] for i, o in enumerate(orders)], axis=1)
    else:
        raise ValueError(f"how must be uniform, tokens or layers, not {how!r}")
    return replace(trace, experts=np.ascontiguousarray(experts))


def closed(ours: TimedResult, lru: TimedResult, oracle: TimedResult) -> tuple[float, float]:
    """Share of the gap from LRU to the oracle that is closed, and bytes over LRU's."""
    return (lru.time - ours.time) / (lru.time - oracle.time), ours.loads / lru.loads


def _worst(trace: Trace, quotas: tuple[int, ...], ratios: tuple[float, ...]) -> tuple[float, str]:
    """The largest time of ours over the best LRU's, and where."""
    worst, where = 0.0, ""
    for quota in quotas:
        config = config_for(trace).replace(quota=quota)
        for ratio in ratios:
            rows = compare(trace, config, load_ratio=ratio, policies=["ours", "lru"])
            share = rows.row("ours").result.time / rows.row("lru").result.time
            if share > worst:
                worst, where = share, f"quota {quota}, r = {ratio:g}"
    return worst, where


def figures() -> Iterator[tuple[str, str, str, bool | None, str]]:
    """(name, value, floor, passed, command) of each figure."""

    def figure(name: str, value: str, floor: str, ok: bool | None) -> Any:
        return name, value, floor, ok, COMMAND

    in_repo = load_trace(IN_REPO)
    if GPT_OSS.exists():
        trace = load_trace(GPT_OSS)
        config = preset("gpt_oss_20b")
        machine = machine_for_ratio(config, 2.0)
        for policy, floor in ((Ours, 5_000), (Lru, 50_000)):
            simulate(trace.head(300), config, machine, policy(config))
            speed = max(
                simulate(trace.head(16_000), config, machine, policy(config)).tokens_per_s
                for _ in range(3)
            )
            yield figure(
                f"timed replay of {policy.name}, gpt_oss_20b, CPU time of one core",
                f"{speed:,.0f} tokens/s",
                f"{floor:,} tokens/s",
                speed >= floor,
            )
        simulate(trace.head(300), config, machine, Belady(config))
        began = time.process_time()
        result = simulate(trace, config, machine, Belady(config))
        seconds = time.process_time() - began
        yield figure(
            f"Belady on {result.tokens:,} tokens, CPU time of one core",
            f"{seconds:.1f} s",
            "10 s",
            seconds < 10,
        )
        for quota in (8, 4):
            for ratio, least in GAPS.items():
                rows = compare(
                    trace,
                    config.replace(quota=quota),
                    load_ratio=ratio,
                    policies=["ours", "lru", "oracle"],
                )
                ours, lru, oracle = (row.result for row in rows.rows)
                gap, loads = closed(ours, lru, oracle)
                yield figure(
                    f"gap from LRU to the oracle closed, gpt_oss_20b, quota {quota}, r = {ratio:g}",
                    f"{gap:.1%} ({lru.time:.3f} to {ours.time:.3f}, oracle {oracle.time:.3f}) "
                    f"with {loads:.3f} of LRU's bytes",
                    f"{least:.0%}, {BYTES[ratio]}",
                    gap >= least and loads <= BYTES[ratio],
                )
        worst, where = _worst(trace.head(10_000), (0, 1, 4, 8, 16), RATIOS)
        yield figure(
            "time over the best LRU's, gpt_oss_20b, worst of r 0.25 to 8 and quota 0 to 16",
            f"{worst:.4f} ({where})",
            "1.005",
            worst <= 1.005,
        )
    worst, where = _worst(in_repo, (0, 1, 2, 4, 6, 8, 12, 16), RATIOS)
    yield figure(
        "the same, in-repo trace, 7,658 tokens",
        f"{worst:.4f} ({where})",
        "1.005",
        worst <= 1.005,
    )
    for how in ("uniform", "tokens", "layers"):
        worst, where = _worst(shuffled(in_repo, how), (0, 1, 4, 8, 16), RATIOS)
        yield figure(
            f"the same, in-repo trace, routing shuffled ({how})",
            f"{worst:.4f} ({where})",
            "1.02",
            worst <= 1.02,
        )
