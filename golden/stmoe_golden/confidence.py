# SPDX-License-Identifier: Apache-2.0
"""The confidence gate's decisions, written once: how sure a prefetch has to be.

Like :mod:`stmoe_golden.predictor`: plain Python over NumPy integer arrays, compiled by Numba, and
the specification that the RTL is held to. Source: architecture section 2, *Confidence gate*; the
idea of moving the aggressiveness of a prefetcher by what became of its prefetches is feedback
directed prefetching (Srinath et al., HPCA 2007).

Each layer has a *level*, 0 after reset. Its threshold is the static one, which depends on how many
layers ahead it is, plus a step for each level. A prefetch of the layer ends *good* when a routing
event finds it resident or on its way (useful, late), and *bad* when it is evicted unused or
cancelled. When a window of them has ended, the level rises by one if fewer than ``strict`` eighths
were good, or, where the link idles, fewer than ``lenient`` eighths; else it falls by one. A layer
whose gate is so high that nothing is issued would never learn that its routing has changed: when
``patience`` events have come without a window's end, its level falls by one all the same.

Farther layers, those two and more ahead, are selected for only where the next layer's prefetches
come late: when a window has ended with fewer than ``late`` eighths of the good ones late (found on
their way, not resident), the layer is *near*: nothing is prefetched for it until it is the next
one. Loading a layer's experts within one layer's time is possible there, and what is known by then
is better. After reset no layer is near.

The link idles where no load was in flight at more than half of the layer's events since: there a
wrong prefetch costs energy but no time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .compilation import NO_ARRAY_MADE
from .config import FRACTION_BITS, EngineConfig

__all__ = [
    "GateParams",
    "GateState",
    "gate_params",
    "new_gate",
    "note_bad",
    "note_event",
    "note_good",
    "threshold_of",
]

kernel = njit(**NO_ARRAY_MADE)


class GateParams(NamedTuple):
    """How thresholds move; quarter units."""

    floors: tuple[int, ...]
    """Static thresholds, those of level 0: of a layer that is one ahead, two, three, four."""
    step: int
    levels: int
    """Highest level; 0 for a static gate."""
    window: int
    """Prefetches of a layer that end before its level moves."""
    strict: int
    """Eighths of them that have to be good while the link is busy."""
    lenient: int
    """Eighths of them that have to be good where the link idles."""
    late: int
    """Eighths of the good ones that have to be late for the layer to be selected for from afar."""
    patience: int
    """Events of a layer without a window's end after which its level falls."""
    score_max: int
    """Highest threshold there can be."""


class GateState(NamedTuple):
    """Registers of each layer, int32 [L]."""

    level: np.ndarray
    good: np.ndarray
    """Since the level was last judged, as the others are; at most 2 * window - 1."""
    bad: np.ndarray
    events: np.ndarray
    idle: np.ndarray
    late: np.ndarray
    """Good ones that were late, likewise."""
    near: np.ndarray
    """1: nothing is prefetched before the layer is the next one."""


def gate_params(config: EngineConfig, *, adaptive: bool | None = None) -> GateParams:
    """Parameters of a configuration; ``adaptive`` in place of the configuration's."""
    if adaptive is None:
        adaptive = config.adaptive
    return GateParams(
        floors=config.floors,
        step=config.gate_step << FRACTION_BITS,
        levels=config.gate_levels if adaptive else 0,
        window=config.gate_window,
        strict=config.gate_strict,
        lenient=config.gate_lenient,
        late=config.gate_late,
        patience=config.gate_patience,
        score_max=(1 << (config.score_bits - 1)) - 1,
    )


def new_gate(num_layers: int) -> GateState:
    """Every level 0, nothing counted."""
    return GateState(*(np.zeros(num_layers, np.int32) for _ in GateState._fields))


@kernel
def threshold_of(p, g, layer, distance):
    """Lowest score that passes in a layer that is ``distance`` layers ahead, quarter units; more
    than any score where none does."""
    if distance > 1 and p.levels > 0 and g.near[layer]:
        return p.score_max + 1
    return min(p.floors[distance - 1] + min(g.level[layer], p.levels) * p.step, p.score_max)


@kernel
def note_good(p, g, layer, late):
    """A prefetch of the layer was needed: resident in time, or ``late``, on its way."""
    if late:
        g.late[layer] = min(g.late[layer] + 1, 2 * p.window - 1)
    g.good[layer] = min(g.good[layer] + 1, 2 * p.window - 1)


@kernel
def note_bad(p, g, layer):
    """A prefetch of the layer was evicted unused, or cancelled."""
    g.bad[layer] = min(g.bad[layer] + 1, 2 * p.window - 1)


@kernel
def _clear(g, layer):
    g.good[layer] = g.bad[layer] = g.events[layer] = g.idle[layer] = g.late[layer] = 0


@kernel
def note_event(p, g, layer, idle):
    """The layer has been routed and the prefetches that were good have been noted.

    What the event disproves is cancelled later, and counts for the layer's next event.

    Parameters
    ----------
    idle : bool
        No load was in flight when the event came.

    Returns
    -------
    bool
        The layer's level has moved.
    """
    if p.levels == 0:
        g.level[layer] = g.near[layer] = 0
        _clear(g, layer)
        return False
    g.events[layer] += 1
    if idle:
        g.idle[layer] += 1
    level = g.level[layer]
    if g.good[layer] + g.bad[layer] >= p.window:
        needed = p.lenient if 2 * g.idle[layer] > g.events[layer] else p.strict
        if 8 * g.good[layer] < needed * (g.good[layer] + g.bad[layer]):
            level = min(level + 1, p.levels)
        else:
            level = max(level - 1, 0)
        g.near[layer] = 8 * g.late[layer] < p.late * g.good[layer]
    elif g.events[layer] >= p.patience:
        level = max(level - 1, 0)
    else:
        return False
    moved = level != g.level[layer]
    g.level[layer] = level
    _clear(g, layer)
    return moved
