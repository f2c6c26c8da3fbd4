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
    said += _far_tier(config, machine, lru)
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


def _far_tier(config: EngineConfig, machine: Machine, lru: TimedResult) -> list[str]:
    """What the tier behind the near one decides, where that lacks some experts."""
    experts = config.num_layers * config.num_experts
    reads = lru.total("far_loads")
    if machine.near >= experts or not reads:
        return []
    said = []
    held = f"the memory behind the link holds {machine.near / experts:.0%} of the experts"
    busy = lru.total("far_cycles") / lru.compute_cycles
    if busy >= SATURATED:
        said.append(
            f"far tier saturated: {held}, and with LRU reading the others takes {busy:.2f} times "
            f"the compute time; no policy that reads as much can be faster than that"
        )
    latency, load = machine.far_latency.mean(), machine.far_load.mean()
    waits = reads * latency / lru.compute_cycles
    if latency > load and waits >= SATURATED:
        said.append(
            f"far latency decides: {held}, and the first byte of another comes after "
            f"{latency / load:.1f} times what reading it then takes; one after the other LRU's "
            f"{reads} reads wait {waits:.2f} times the compute time for their first bytes"
        )
    return said
