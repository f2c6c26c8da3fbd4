# SPDX-License-Identifier: Apache-2.0
"""A hot list: each layer's most used experts stay, for good."""

from __future__ import annotations

import numpy as np

from ..traces import Trace
from .base import Plan
from .lfu import Lfu

__all__ = ["Static"]


class Static(Lfu):
    """The hot list is what the warm-up half used most; it never changes in the measured half."""

    name = "static"

    def plan(self, trace: Trace, first: int, last: int, starts: np.ndarray, measured: bool) -> Plan:
        if not measured:
            return super().plan(trace, first, last, starts, measured)
        return Plan(worth=np.tile(self.counts, (last - first, 1)))
