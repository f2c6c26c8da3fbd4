# SPDX-License-Identifier: Apache-2.0
"""The predictor's decisions, written once: learn, reseed, look ahead, select.

Plain Python over NumPy integer arrays; this text is the specification that the RTL is held to.
Numba compiles these very functions for whole-trace replay. All scores are in quarter units.

Source: the online perceptron of architecture section 2; the idea of spatial and temporal
correlation is that of ST-MoE (arXiv 2606.15453).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .compilation import NO_ARRAY_MADE
from .config import FRACTION_BITS, USE_BITS, EngineConfig

__all__ = [
    "Predictor",
    "PredictorParams",
    "PredictorState",
    "add_row",
    "begin_sequence",
    "clip",
    "kinds_of",
    "learn",
    "look_ahead",
    "new_state",
    "observe",
    "params_of",
    "pick",
    "remember",
    "reseed",
    "select",
]

kernel = njit(**NO_ARRAY_MADE)


class PredictorParams(NamedTuple):
    """What the decision functions need of an :class:`EngineConfig`; margins in quarter units."""

    num_layers: int
    num_experts: int
    top_k: int
    depth: int
    weight_max: int
    bias_max: int
    score_max: int
    margin_low: int
    margin_step: int
    margin_high: int
    gains: np.ndarray
    """int64 [K]: gain of each rank in quarter units."""
    learning: bool
    kinds: np.ndarray
    """bool [D + 2]: the kinds of predictor that are enabled, numbered as their tables in the
    register TABLE_INDEX: bias, temporal, spatial of distance 1 to D. One that is not adds nothing
    to any score, and its rows neither learn nor change."""


class PredictorState(NamedTuple):
    """Tables and one context's scores and history."""

    score: np.ndarray
    """int32 [L, E]: quarter units."""
    bias: np.ndarray
    """int32 [L, E]."""
    spatial: np.ndarray
    """int32 [D, L, E, E]: row ``[d-1, l, i]`` is what expert i of layer l-d says of layer l."""
    temporal: np.ndarray
    """int32 [L, E, E]: row ``[l, i]`` is what expert i says of its own layer's next token."""
    use: np.ndarray
    """int32 [L, E]: decaying use count, 0 to 1023."""
    history: np.ndarray
    """int32 [L, K]: the latest set of each layer, in rank order; -1 when there is none."""


BIAS, TEMPORAL = 0, 1
"""Kinds of predictor; a spatial one is TEMPORAL + its distance."""


def kinds_of(config: EngineConfig, predictors: int | None = None) -> np.ndarray:
    """bool [D + 2] of the register PREDICTORS, bit n for kind n; every kind for None."""
    bits = -1 if predictors is None else predictors
    return np.array([bits >> kind & 1 for kind in range(config.depth + 2)], np.bool_)


def params_of(
    config: EngineConfig,
    *,
    learning: bool = True,
    ordered: bool = True,
    predictors: int | None = None,
) -> PredictorParams:
    """Parameters of a configuration; ``ordered`` false makes every rank's gain 4 quarters,
    ``predictors`` is as for :func:`kinds_of`."""
    one = 1 << FRACTION_BITS
    gains = config.gains if ordered else (one,) * config.top_k
    return PredictorParams(
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        depth=config.depth,
        weight_max=(1 << (config.weight_bits - 1)) - 1,
        bias_max=(1 << (config.bias_bits - 1)) - 1,
        score_max=(1 << (config.score_bits - 1)) - 1,
        margin_low=config.margin_low * one,
        margin_step=config.margin_step * one,
        margin_high=config.margin_high * one,
        gains=np.array(gains, dtype=np.int64),
        learning=learning,
        kinds=kinds_of(config, predictors),
    )


def new_state(config: EngineConfig) -> PredictorState:
    """Cold tables, no history."""
    layers, experts, depth = config.num_layers, config.num_experts, config.depth
    return PredictorState(
        score=np.zeros((layers, experts), np.int32),
        bias=np.zeros((layers, experts), np.int32),
        spatial=np.zeros((depth, layers, experts, experts), np.int32),
        temporal=np.zeros((layers, experts, experts), np.int32),
        use=np.zeros((layers, experts), np.int32),
        history=np.full((layers, config.top_k), -1, np.int32),
    )


@kernel
def clip(value, high):
    """Saturate to the two's complement range whose largest value is ``high``."""
    if value > high:
        return high
    if value < -high - 1:
        return -high - 1
    return value


@kernel
def begin_sequence(p, s):
    """A new sequence: the context's history is reset and every score is its bias."""
    s.history[:] = -1
    for m in range(p.num_layers):
        for e in range(p.num_experts):
            s.score[m, e] = s.bias[m, e] << 2 if p.kinds[BIAS] else 0


@kernel
def learn(p, s, layer, experts):
    """Grade ``score[layer]`` against the set that was used and correct the rows behind it.

    Every row that had contributed gets the same delta of -3 to 3 per lane, saturating; rows of a
    kind that is enabled now count as such, whatever was enabled when the score was made.
    """
    for e in range(p.num_experts):
        score = s.score[layer, e]
        used = False
        for expert in experts:
            used |= expert == e
        if used:
            delta = (
                int(score < p.margin_low) + int(score < p.margin_step) + int(score < -p.margin_high)
            )
        else:
            delta = -(
                int(score > -p.margin_low)
                + int(score > -p.margin_step)
                + int(score > p.margin_high)
            )
        if p.learning and delta != 0:
            if p.kinds[BIAS]:
                s.bias[layer, e] = clip(s.bias[layer, e] + delta, p.bias_max)
            for d in range(1, p.depth + 1):
                source = (layer - d) % p.num_layers
                for i in s.history[source]:
                    if i >= 0 and p.kinds[TEMPORAL + d]:
                        row = s.spatial[d - 1, layer, i]
                        row[e] = clip(row[e] + delta, p.weight_max)
            for i in s.history[layer]:
                if i >= 0 and p.kinds[TEMPORAL]:
                    row = s.temporal[layer, i]
                    row[e] = clip(row[e] + delta, p.weight_max)
        count = s.use[layer, e]
        if count != 0:
            count -= max(1, count >> 5)
        if used:
            count = min(USE_MAX, count + 32)
        s.use[layer, e] = count


USE_MAX = (1 << USE_BITS) - 1


@kernel
def add_row(scores, gain, weights, high):
    """Add one expert's row to a layer's scores; each saturates with every row that is added.

    Lanes of a row lie side by side in memory, so that this loop becomes vector instructions.
    """
    for e in range(len(scores)):
        scores[e] = clip(scores[e] + gain * weights[e], high)


@kernel
def reseed(p, s, layer, experts):
    """Start the score of this layer's next visit from its bias and the set just used."""
    for e in range(p.num_experts):
        s.score[layer, e] = s.bias[layer, e] << 2 if p.kinds[BIAS] else 0
    for rank in range(p.top_k if p.kinds[TEMPORAL] else 0):
        add_row(s.score[layer], p.gains[rank], s.temporal[layer, experts[rank]], p.score_max)


@kernel
def look_ahead(p, s, layer, experts):
    """Add what this set says of the next D layers; past the last layer is the next token."""
    for d in range(1, p.depth + 1):
        if not p.kinds[TEMPORAL + d]:
            continue
        target = (layer + d) % p.num_layers
        for rank in range(p.top_k):
            row = s.spatial[d - 1, target, experts[rank]]
            add_row(s.score[target], p.gains[rank], row, p.score_max)


@kernel
def remember(s, layer, experts):
    """The set becomes the layer's latest."""
    for rank in range(len(experts)):
        s.history[layer, rank] = experts[rank]


@kernel
def observe(p, s, layer, experts):
    """Learn, reseed and look ahead for one routing event: all that changes at score commit.

    ``learning``, ``gains`` and ``kinds`` are those of when the event was taken; a token's ``kinds``
    likewise (:func:`begin_sequence`).
    """
    learn(p, s, layer, experts)
    reseed(p, s, layer, experts)
    look_ahead(p, s, layer, experts)
    remember(s, layer, experts)


@kernel
def pick(score_row, allowed, threshold, picks):
    """:func:`select` without an array of its own: fills ``picks``, whose length is the limit, and
    returns how many they are; they are no longer ``allowed``."""
    n = 0
    while n < len(picks):
        best = -1
        for e in range(len(score_row)):
            if allowed[e] and score_row[e] >= threshold:
                if best < 0 or score_row[e] > score_row[best]:
                    best = e
        if best < 0:
            break
        allowed[best] = False
        picks[n] = best
        n += 1
    return n


@njit(cache=True)
def select(score_row, allowed, threshold, limit):
    """Experts to prefetch: highest score first, ties to the lowest index.

    Parameters
    ----------
    score_row : int32 [E]
        Scores of the layer, quarter units.
    allowed : bool [E]
        Experts that are neither resident nor on their way.
    threshold : int
        Lowest score that passes the confidence gate, quarter units.
    limit : int
        Most experts to select.

    Returns
    -------
    int64 [n]
        At most ``limit`` expert indices, in the order they are to be loaded.
    """
    picks = np.empty(limit, np.int64)
    return picks[: pick(score_row, allowed.copy(), threshold, picks)]


class Predictor:
    """One context's predictor, driven event by event (the checker's and the benches' oracle)."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        learning: bool = True,
        ordered: bool = True,
        predictors: int | None = None,
    ):
        self.config = config
        self.params = params_of(config, learning=learning, ordered=ordered, predictors=predictors)
        self.state = new_state(config)

    def token(self, new_sequence: bool) -> None:
        """A token begins."""
        if new_sequence:
            begin_sequence(self.params, self.state)

    def route(self, layer: int, experts: np.ndarray) -> None:
        """A routing event: everything up to and including the score commit."""
        observe(self.params, self.state, layer, np.asarray(experts, np.int64))

    def select(self, layer: int, allowed: np.ndarray, threshold: int) -> np.ndarray:
        """Experts of ``layer`` worth loading, best first; threshold in quarter units."""
        return select(self.state.score[layer], allowed, threshold, self.config.num_select)
