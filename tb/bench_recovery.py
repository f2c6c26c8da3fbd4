# SPDX-License-Identifier: Apache-2.0
"""`make bench BENCH_ARGS=recovery`: how soon the engine is itself again after a change of workload.

Two workloads are spliced, and the second is timed token by token, twice: after the first, and
after more of its own kind, which is its steady time. Both are the same tokens, so what differs is
what tables, scores, use counts, buffer and gate still hold of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from simulation import GPT_OSS, IN_REPO
from stmoe_golden.config import EngineConfig
from stmoe_golden.machine import machine_for_ratio
from stmoe_golden.policies.ours import Ours
from stmoe_golden.timing import simulate
from stmoe_golden.traces import Trace, config_for, load_trace

__all__ = ["Splice", "figures", "recovery"]

RATIOS = (0.5, 1.0, 2.0, 4.0)
QUOTAS = (4, 8)
WINDOW = 200
"""Tokens over which the time per token is averaged: about a sequence of the in-repo trace."""
MARGIN = 1.05
LIMIT = 1000
COMMAND = "make bench BENCH_ARGS=recovery"


class Splice(NamedTuple):
    """A change of workload."""

    name: str
    before: Trace
    warm: Trace
    """Of the second workload, for its steady time."""
    after: Trace
    """The tokens of the second workload that are timed."""


def joined(first: Trace, second: Trace) -> Trace:
    """One after the other; where the second begins, a sequence begins."""
    sequence = second.sequence - second.sequence[0] + first.sequence[-1] + 1
    return Trace(
        experts=np.concatenate((first.experts, second.experts)),
        sequence=np.concatenate((first.sequence, sequence)),
        info=first.info,
    )


def renamed(trace: Trace, seed: int = 1) -> Trace:
    """The same routing with the experts of each layer shuffled: nothing that was learned holds,
    as if another model had been loaded, and everything is as predictable as before."""
    rng = np.random.default_rng(seed)
    layers = range(trace.num_layers)
    names = np.stack([rng.permutation(trace.num_experts) for _ in layers])
    experts = np.stack([names[m][trace.experts[:, m]] for m in layers], axis=1)
    return Trace(
        experts=experts.astype(trace.experts.dtype), sequence=trace.sequence, info=trace.info
    )


def _splice(name: str, first: Trace, second: Trace, warm: int) -> Splice:
    return Splice(name, first, second.take(slice(warm)), second.take(slice(warm, None)))


def _of(trace: Trace, key: str, prefix: str) -> np.ndarray:
    """Tokens of the sequences of which ``info`` says so."""
    kinds = np.array([str(sequence[key]) for sequence in trace.info["sequences"]])
    return np.nonzero(np.char.startswith(kinds, prefix)[trace.sequence])[0]


def splices() -> Iterator[Splice]:
    """Changes of domain, and of everything, in each trace that is here."""
    trace = load_trace(IN_REPO)
    code, prose = (trace.take(_of(trace, "domain", kind)) for kind in ("code", "prose"))
    yield _splice("in-repo, code then prose", code, prose, 1100)
    yield _splice("in-repo, prose then code", prose, code, 1300)
    half = trace.num_tokens // 2
    yield _splice("in-repo, then experts renamed", trace.head(half), renamed(trace), half)
    if GPT_OSS.exists():
        trace = load_trace(GPT_OSS)
        science = trace.take(_of(trace, "dataset", "gpqa")[:6000])
        safety = trace.take(_of(trace, "dataset", "sorry_bench")[:6500])
        yield _splice("gpt_oss_20b, science then safety chat", science, safety, 3500)
        second = renamed(trace.head(9000))
        yield _splice("gpt_oss_20b, then experts renamed", trace.head(6000), second, 6000)


def recovery(splice: Splice, config: EngineConfig, load_ratio: float) -> tuple[int, float]:
    """(tokens after which every window takes at most :data:`MARGIN` of its steady time, and what
    the first window after :data:`LIMIT` tokens takes)."""
    times = []
    for first in (splice.before, splice.warm):
        result = simulate(
            joined(first, splice.after),
            config,
            machine_for_ratio(config, load_ratio),
            Ours(config),
            warm_up=first.num_tokens,
        )
        times.append(np.convolve(result.latency, np.ones(WINDOW), "valid"))
    changed = times[0] / times[1]
    slow = np.nonzero(changed > MARGIN)[0]
    return int(slow[-1]) + 1 if len(slow) else 0, float(changed[LIMIT])


def figures() -> Iterator[tuple[str, str, str, bool, str]]:
    """The worst of all load ratios and quotas, for each splice."""
    for splice in splices():
        shape = config_for(splice.before).replace(adaptive=True)
        runs = {
            (load_ratio, quota): recovery(splice, shape.replace(quota=quota), load_ratio)
            for quota in QUOTAS
            for load_ratio in RATIOS
        }
        (load_ratio, quota), (tokens, _) = max(runs.items(), key=lambda run: run[1])
        then = max(ratio for _, ratio in runs.values())
        yield (
            f"tokens until time per token ({WINDOW} tokens' mean) stays within 5 % of steady, "
            f"{splice.name}, worst of r = 0.5, 1, 2, 4 and quota 4, 8",
            f"{tokens:,} (r = {load_ratio:g}, quota {quota}); {then:.3f} of it after {LIMIT:,}",
            f"{LIMIT:,}",
            tokens <= LIMIT,
            COMMAND,
        )
