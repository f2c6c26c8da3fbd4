# SPDX-License-Identifier: Apache-2.0
"""Where prefetching cannot help, said in a sentence with the number that decides it."""

from __future__ import annotations

from .config import EngineConfig
from .timing import Machine, TimedResult
from .trace_statistics import repeat_rate
from .traces import Trace

__all__ = ["guardrails"]

SATURATED = 0.95
"""Time of LRU's loads over compute, from which the link decides and not the policy."""
IDLE = 0.01
"""Share of time that LRU waits, below which there is nothing to save."""
CHANCE = 1.25
"""Repeat rate over chance, from which routing has any locality."""


def guardrails(trace: Trace, config: EngineConfig, machine: Machine, lru: TimedResult) -> list[str]:
    """Sentences; none where nothing stands in the way.

    Parameters
    ----------
    lru : TimedResult
        The best LRU on the same machine: what the link is busy with when nothing is prefetched.
    """
    said = []
    loads = lru.link_cycles / lru.compute_cycles
    waits = 1 - lru.compute_cycles / lru.cycles
    if loads >= SATURATED:
        said.append(
            f"link saturated: with LRU the loads alone take {loads:.2f} times the compute time; "
            f"however well it prefetches, no policy that loads as much can be faster than that"
        )
    far = lru.total("far_cycles") / lru.compute_cycles
    if far >= SATURATED:
        held = machine.near / (config.num_layers * config.num_experts)
        said.append(
            f"far tier saturated: the memory behind the link holds {held:.0%} of the experts, and "
            f"with LRU reading the others from behind it takes {far:.2f} times the compute time; "
            f"more memory there helps more than any prefetch"
        )
    if waits < IDLE:
        said.append(
            f"nothing to hide: with LRU the accelerator waits {waits:.2%} of the time, which is "
            f"all that prefetching could save"
        )
    latency, load = machine.latency.mean(), machine.load.mean()
    if latency > load:
        said.append(
            f"latency decides: the first byte comes after {latency / load:.1f} times what a whole "
            f"expert then takes on the link, and r counts the latter alone; a prefetch one layer "
            f"ahead has {machine.attention.mean() / latency:.2f} of that latency in attention"
        )
    need = 2 * config.top_k
    if machine.slots < need:
        said.append(
            f"buffer below one layer's set and its prefetches: {machine.slots} slots, but one "
            f"layer's set is {config.top_k} experts and the next one's as many, so {need} are "
            f"needed before a whole layer can be prefetched"
        )
    chance = trace.top_k / trace.num_experts
    rate = repeat_rate(trace)
    if rate < CHANCE * chance:
        said.append(
            f"routing without locality: {rate:.3f} of experts were used by the token before, by "
            f"chance it would be {chance:.3f}; there is little to predict from"
        )
    return said
