# SPDX-License-Identifier: Apache-2.0
"""Prefetches what the token before used in the next layer."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..config import EngineConfig
from ..traces import Trace
from .base import Plan, Policy

__all__ = ["Previous"]

kernel = njit(cache=True)


@kernel
def _previous_sets(experts, starts, history, guess, first):
    """``history`` is each layer's latest set, -1 where the sequence has none yet."""
    tokens, layers, top_k = experts.shape
    n = 0
    for token in range(tokens):
        if starts[token]:
            history[:] = -1
        for e in history[0]:
            if e >= 0:
                first[token, e] = 1
        for layer in range(layers):
            for rank in range(top_k):
                history[layer, rank] = experts[token, layer, rank]
            for e in history[(layer + 1) % layers]:
                if e >= 0:
                    guess[n, e] = 1
            n += 1


class Previous(Policy):
    """The previous token's set of the next layer, LRU retention."""

    name = "previous"
    prefetches = True

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.history = np.full((config.num_layers, config.top_k), -1, np.int64)

    def plan(self, trace: Trace, first: int, last: int, starts: np.ndarray, measured: bool) -> Plan:
        tokens, lanes = last - first, self.config.num_experts
        guess = np.zeros((tokens * self.config.num_layers, lanes), np.int32)
        at_start = np.zeros((tokens, lanes), np.int32)
        _previous_sets(trace.experts[first:last], starts[first:last], self.history, guess, at_start)
        return Plan(guess=guess, first=at_start)
