# SPDX-License-Identifier: Apache-2.0
"""The published tables (architecture section 9; arXiv 2606.15453)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import njit

from .. import replay as _replay
from ..config import EngineConfig
from ..replay import PAPER_THRESHOLD, new_paper_state, paper_scores, paper_update
from ..traces import Trace
from .base import Plan, Policy

__all__ = ["Paper"]

kernel = njit(cache=True)


def _compiled(source: int) -> Callable[..., None]:
    """Closes over the checksum of replay.py, so that a change there recompiles this loop."""

    @kernel
    def plan(s, scores, threshold, experts, starts, guess, first):
        assert source >= 0
        tokens, layers, _ = experts.shape
        n = 0
        for token in range(tokens):
            if starts[token]:
                s.history[:] = -1
                paper_scores(s, 0, scores)
            first[token] = scores
            for layer in range(layers):
                paper_update(s, layer, experts[token, layer], scores, threshold)
                paper_scores(s, (layer + 1) % layers, scores)
                guess[n] = scores
                n += 1

    return plan


_PLAN = _compiled(zlib.crc32(Path(_replay.__file__).read_bytes()))


class Paper(Policy):
    """CCT and HT with M = 2K candidates: everything with a sum of 2 is prefetched. LRU retention,
    as the paper says nothing of eviction."""

    name = "paper"
    prefetches = True
    threshold = PAPER_THRESHOLD

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.limit = config.num_experts
        self.state = new_paper_state(config, 2 * config.top_k)
        self.scores = np.zeros(config.num_experts, np.int64)

    def plan(self, trace: Trace, first: int, last: int, starts: np.ndarray, measured: bool) -> Plan:
        tokens, lanes = last - first, self.config.num_experts
        guess = np.empty((tokens * self.config.num_layers, lanes), np.int32)
        at_start = np.empty((tokens, lanes), np.int32)
        _PLAN(
            self.state,
            self.scores,
            self.threshold,
            trace.experts[first:last].astype(np.int64, order="C"),
            starts[first:last],
            guess,
            at_start,
        )
        return Plan(guess=guess, first=at_start)
