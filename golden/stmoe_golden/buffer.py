# SPDX-License-Identifier: Apache-2.0
"""The expert buffer's decisions, written once: lookup, victim, admission, prefetch order.

Like :mod:`stmoe_golden.predictor`: plain Python over NumPy integer arrays, compiled by Numba, and
the specification that the RTL is held to. Source: architecture sections 2 and 3.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numba import njit

from .compilation import NO_ARRAY_MADE
from .config import EngineConfig

__all__ = [
    "BufferState",
    "READY",
    "READY_UNUSED",
    "Lane",
    "admits",
    "evictable",
    "new_buffer",
    "value_of",
    "victim",
]

kernel = njit(**NO_ARRAY_MADE)


class Lane(IntEnum):
    """State of one expert of one layer; the numbers are those of the RTL's ``LaneState``."""

    NONE = 0
    LOADING_PREFETCH = 1
    LOADING_DEMAND = 2
    READY = 3
    READY_UNUSED = 4
    PINNED = 5


READY = int(Lane.READY)
READY_UNUSED = int(Lane.READY_UNUSED)


class BufferState(NamedTuple):
    """Which expert is where."""

    lane: np.ndarray
    """int8 [L, E]: :class:`Lane`."""
    slot: np.ndarray
    """int32 [L, E]: the expert's slot, -1 when it has none."""
    held: np.ndarray
    """int32 [L]: slots that are not free, draining and quarantined ones included."""
    quota: np.ndarray
    """int32 [L]: slots that each layer keeps."""


def new_buffer(config: EngineConfig) -> BufferState:
    """An empty buffer with the configuration's quotas."""
    layers, experts = config.num_layers, config.num_experts
    return BufferState(
        lane=np.zeros((layers, experts), np.int8),
        slot=np.full((layers, experts), -1, np.int32),
        held=np.zeros(layers, np.int32),
        quota=np.full(layers, config.quota, np.int32),
    )


@kernel
def value_of(score_row, use_row, expert, use_shift):
    """What a resident (or candidate) expert is worth, in quarter units."""
    return score_row[expert] + (use_row[expert] << use_shift)


@kernel
def evictable(state):
    """Ready and without pins."""
    return state == READY or state == READY_UNUSED


@kernel
def lowest(lane_row, score_row, use_row, use_shift, kept):
    """The evictable expert of a layer that is worth least, ties to the lowest; -1 if none.

    ``kept`` (bool [E], or [0] for none) marks experts that are not to be considered.
    """
    best = -1
    for e in range(len(lane_row)):
        if evictable(lane_row[e]) and not (e < len(kept) and kept[e]):
            if best < 0 or value_of(score_row, use_row, e, use_shift) < value_of(
                score_row, use_row, best, use_shift
            ):
                best = e
    return best


@kernel
def victim(b, score, use, use_shift, load_layer, latest, current_set, demand):
    """Whose slot a load takes when none is free.

    Walk the layers latest-1, latest-2, ..., latest (mod L); in the first that is over its quota
    and has an evictable expert outside the current set, the one of lowest value; else the same in
    ``load_layer``, whatever its quota; else, for a demand only, the lowest value of all, the
    current set not excepted (ties to the first layer of the walk).

    Parameters
    ----------
    b : BufferState
    score, use : int32 [L, E]
        The predictor's rows as of the last score commit.
    current_set : bool [E]
        The latest event's set, of layer ``latest``.

    Returns
    -------
    (layer, expert), or (-1, -1) when there is none.
    """
    layers = len(b.lane)
    nothing = current_set[:0]
    for step in range(1, layers + 1):
        m = (latest - step) % layers
        if b.held[m] > b.quota[m]:
            kept = current_set if m == latest else nothing
            e = lowest(b.lane[m], score[m], use[m], use_shift, kept)
            if e >= 0:
                return m, e
    kept = current_set if load_layer == latest else nothing
    e = lowest(b.lane[load_layer], score[load_layer], use[load_layer], use_shift, kept)
    if e >= 0:
        return load_layer, e
    best_layer, best = -1, -1
    if demand:
        for step in range(1, layers + 1):
            m = (latest - step) % layers
            e = lowest(b.lane[m], score[m], use[m], use_shift, nothing)
            if e >= 0 and (
                best < 0
                or value_of(score[m], use[m], e, use_shift)
                < value_of(score[best_layer], use[best_layer], best, use_shift)
            ):
                best_layer, best = m, e
    return best_layer, best


@kernel
def admits(score, use, use_shift, bonus, load_layer, load_expert, victim_layer, victim_expert):
    """Whether a prefetch is worth more than the expert it would replace.

    What it is worth counts ``bonus`` more (quarter units): it is for the layer that comes next,
    while its victim has most of a token's time to be fetched again.
    """
    worth = value_of(score[load_layer], use[load_layer], load_expert, use_shift) + bonus
    return worth > value_of(score[victim_layer], use[victim_layer], victim_expert, use_shift)
