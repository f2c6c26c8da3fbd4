# SPDX-License-Identifier: Apache-2.0
"""Knows the next layer's routing one layer ahead."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..traces import Trace
from .base import Plan, Policy

__all__ = ["Oracle", "next_sets"]

kernel = njit(cache=True)


@kernel
def next_sets(experts, following, guess):
    """Row n of ``guess`` is 1 in the lanes of the set after event n; ``following`` is the token
    after the last (or no token)."""
    tokens, layers, _ = experts.shape
    for n in range(tokens * layers):
        token, layer = (n + 1) // layers, (n + 1) % layers
        if token < tokens:
            for e in experts[token, layer]:
                guess[n, e] = 1
        elif len(following) > 0:
            for e in following[0, layer]:
                guess[n, e] = 1


class Oracle(Policy):
    """Perfect prefetch of the next layer; what to keep is the engine's own choice, as it can see no
    further than one layer either."""

    name = "oracle"
    prefetches = True
    learned = True

    def plan(self, trace: Trace, first: int, last: int, starts: np.ndarray, measured: bool) -> Plan:
        layers, experts = self.config.num_layers, self.config.num_experts
        guess = np.zeros(((last - first) * layers, experts), np.int32)
        next_sets(trace.experts[first:last], trace.experts[last : last + 1], guess)
        at_start = np.zeros((last - first, experts), np.int32)
        np.put_along_axis(at_start, trace.experts[first:last, 0].astype(np.int64), 1, axis=1)
        return Plan(guess=guess, first=at_start)
