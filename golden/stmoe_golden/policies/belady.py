# SPDX-License-Identifier: Apache-2.0
"""Belady's MIN: evicts what is needed again last. No prefetch; knows the whole future."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..config import EngineConfig
from ..traces import Trace
from .base import Plan, Policy, Retention

__all__ = ["NEVER_AGAIN", "Belady"]

kernel = njit(cache=True)

NEVER_AGAIN = (1 << 31) - 1


@kernel
def _next_uses(experts, after):
    """``after[n, rank]`` is the token that next uses, in its layer, the expert of that rank."""
    tokens, layers, top_k = experts.shape
    upcoming = np.full((layers, 65536), NEVER_AGAIN, np.int32)
    for token in range(tokens - 1, -1, -1):
        for layer in range(layers):
            for rank in range(top_k):
                e = experts[token, layer, rank]
                after[token, layer, rank] = upcoming[layer, e]
                upcoming[layer, e] = token


@kernel
def _worth(experts, after, table, worth):
    """What an expert is worth falls with the event of its next use: ``table`` is [L, E]."""
    tokens, layers, top_k = experts.shape
    n = 0
    for t in range(tokens):
        for layer in range(layers):
            for rank in range(top_k):
                following = after[t, layer, rank]
                value = -NEVER_AGAIN
                if following < NEVER_AGAIN // layers:
                    value = -(following * layers + layer)
                table[layer, experts[t, layer, rank]] = value
            worth[n] = table[layer]
            n += 1


class Belady(Policy):
    """The fewest loads that any on-demand buffer of as many slots can do with."""

    name = "belady"
    values = True
    retention = Retention.GLOBAL

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.table = np.zeros((config.num_layers, config.num_experts), np.int32)
        self.after = np.zeros((0, 0, 0), np.int32)

    def prepare(self, trace: Trace) -> None:
        self.after = np.empty(trace.experts.shape, np.int32)
        _next_uses(trace.experts, self.after)

    def plan(self, trace: Trace, first: int, last: int, starts: np.ndarray, measured: bool) -> Plan:
        rows = (last - first) * self.config.num_layers
        worth = np.empty((rows, self.config.num_experts), np.int32)
        _worth(trace.experts[first:last], self.after[first:last], self.table, worth)
        return Plan(worth=worth)
