# SPDX-License-Identifier: Apache-2.0
"""Uses fewer experts where the gate is sure. Changes the model's output, unlike all others."""

from __future__ import annotations

import numpy as np

from ..traces import Trace
from .base import Plan, Policy

__all__ = ["AdaptiveGating"]


class AdaptiveGating(Policy):
    """Runs only the heaviest experts that together hold :attr:`share` of the set's gate weight;
    the rest are neither loaded nor run. On demand, LRU retention. Source: adaptive gating (Li et
    al., EMNLP 2023, arXiv 2310.07188), which chooses between one expert and two, made one rule for
    any K. In a trace without gate weights, or without an order, nothing can be skipped."""

    name = "adaptive_gating"
    share = 0.8

    def note(self, trace: Trace) -> str | None:
        if trace.weights is None or not trace.ordered:
            return "the trace has no ordered gate weights, so nothing is skipped"
        return "skips experts: the model's output changes"

    def plan(
        self, trace: Trace, first: int, last: int, starts: np.ndarray, measured: bool
    ) -> Plan | None:
        if trace.weights is None or not trace.ordered:
            return None
        weights = trace.weights[first:last].astype(np.float64)
        reached = np.cumsum(weights, axis=2) >= self.share * weights.sum(axis=2, keepdims=True)
        used = np.where(reached.any(axis=2), np.argmax(reached, axis=2) + 1, trace.top_k)
        return Plan(used=used.reshape(-1).astype(np.int32))
