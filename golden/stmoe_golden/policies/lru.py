# SPDX-License-Identifier: Apache-2.0
"""Least recently used, on demand, in three forms; the best of them is the baseline."""

from __future__ import annotations

from .base import Policy, Retention

__all__ = ["LRU_FORMS", "Lru", "LruGlobal", "LruPerLayer"]


class Lru(Policy):
    """Recency order inside the engine's own victim walk."""

    name = "lru"


class LruPerLayer(Policy):
    """Each layer has an equal share of all slots, and evicts its own."""

    name = "lru_per_layer"
    retention = Retention.LAYER


class LruGlobal(Policy):
    """One recency order over all layers."""

    name = "lru_global"
    retention = Retention.GLOBAL


LRU_FORMS = (Lru, LruPerLayer, LruGlobal)
