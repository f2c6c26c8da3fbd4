# SPDX-License-Identifier: Apache-2.0
"""Least frequently used, on demand."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..config import EngineConfig
from ..traces import Trace
from .base import Plan, Policy

__all__ = ["Lfu", "count_uses"]

kernel = njit(cache=True)


@kernel
def count_uses(experts, counts, worth):
    """Row n of ``worth`` is how often each expert of event n's layer has been used so far."""
    n = 0
    for token in range(experts.shape[0]):
        for layer in range(experts.shape[1]):
            for e in experts[token, layer]:
                counts[layer, e] += 1
            worth[n] = counts[layer]
            n += 1


class Lfu(Policy):
    """Keeps what has been used most often since the start, whether resident or not."""

    name = "lfu"
    values = True

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.counts = np.zeros((config.num_layers, config.num_experts), np.int32)

    def plan(self, trace: Trace, first: int, last: int, starts: np.ndarray, measured: bool) -> Plan:
        rows = (last - first) * self.config.num_layers
        worth = np.empty((rows, self.config.num_experts), np.int32)
        count_uses(trace.experts[first:last], self.counts, worth)
        return Plan(worth=worth)
