# SPDX-License-Identifier: Apache-2.0
"""Replays a whole routing trace through a predictor and measures what it would have predicted.

The protocol is that of architecture section 8: online and causal from cold tables, history
reset at each new sequence; the first half of the tokens warms up, the second half is measured.
``learned`` calls the very functions of :mod:`stmoe_golden.predictor`, compiled by Numba;
``paper`` is the published baseline (architecture section 9, arXiv 2606.15453).

One pass keeps a histogram of all scores and of the needed experts' scores, so that any static
threshold can be chosen afterwards, and judged, without another pass.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from . import predictor as _predictor
from .config import FRACTION_BITS, EngineConfig
from .predictor import (
    PredictorParams,
    PredictorState,
    begin_sequence,
    new_state,
    observe,
    params_of,
)
from .traces import Trace, TraceError, check_shape

__all__ = [
    "BUDGETS",
    "PREDICTORS",
    "PaperState",
    "ReplayError",
    "ReplayResult",
    "new_paper_state",
    "paper_scores",
    "paper_update",
    "pick_threshold",
    "replay_trace",
]

PREDICTORS = ("learned", "paper")
BUDGETS = {"1K": 2, "1.5K": 3, "2K": 4, "3K": 6}
"""Budgets of recall, in halves of K."""

PAPER_THRESHOLD = 2
"""Sum of confidences from which the paper prefetches."""

ONE = 1 << FRACTION_BITS
CURVE_POINTS = 200
"""Thresholds of a curve of coverage against issue rate."""

CHUNK = 1024
"""Tokens per call of the compiled loop: between two calls an interrupt is seen."""

kernel = njit(cache=True)


class ReplayError(ValueError):
    """A replay option that is not allowed; the message names it."""


# The paper's tables -------------------------------------------------------------------------


class PaperState(NamedTuple):
    """CCT and HT of architecture section 9.

    Where section 9 leaves a choice: rows start empty. Layer 0's row is that of the last layer,
    one token ago, so that layer 0 can be predicted at all; without it layer 0 never reaches a sum
    of 2, and the other layers are the same. A candidate whose confidence falls to 0 is replaced
    at once, by the first expert that was used, not predicted and not in the row, looked for
    through the used experts in rank order, beginning at the rank of the row's own expert so that
    different rows take in different experts. Where there is none it stays, at 0.
    """

    candidate: np.ndarray
    """int16 [L, E, M]: ``[l, i]`` are what expert i of the layer before says of layer l; or -1."""
    confidence: np.ndarray
    """int8 [L, E, M]: 0 to 3."""
    history: np.ndarray
    """int32 [L, K]: HT, the latest set of each layer; -1 when there is none."""


def new_paper_state(config: EngineConfig, candidates: int) -> PaperState:
    """Empty tables, no history."""
    shape = (config.num_layers, config.num_experts, candidates)
    return PaperState(
        candidate=np.full(shape, -1, np.int16),
        confidence=np.zeros(shape, np.int8),
        history=np.full((config.num_layers, config.top_k), -1, np.int32),
    )


@kernel
def paper_scores(s, layer, scores):
    """Sums of confidences for a layer whose predecessor has been seen; whole units."""
    scores[:] = 0
    # history[layer - 1] is this token's; for layer 0 it is history[-1], the last layer's.
    for i in s.history[layer - 1]:
        if i >= 0:
            for m in range(s.candidate.shape[2]):
                if s.candidate[layer, i, m] >= 0:
                    scores[s.candidate[layer, i, m]] += s.confidence[layer, i, m]
    for i in s.history[layer]:
        if i >= 0:
            scores[i] += 1


@kernel
def paper_update(s, layer, experts, scores, threshold):
    """Correct the active rows; ``scores`` are those that the set was predicted with."""
    top_k = len(experts)
    used = np.zeros(len(scores), np.bool_)
    for expert in experts:
        used[expert] = True
    for rank in range(top_k):
        i = s.history[layer - 1, rank]
        if i < 0:
            continue
        row = s.candidate[layer, i]
        confidence = s.confidence[layer, i]
        for m in range(len(row)):
            if row[m] >= 0 and used[row[m]]:
                confidence[m] = min(3, confidence[m] + 1)
                continue
            confidence[m] = max(0, confidence[m] - 1)
            if confidence[m] > 0:
                continue
            for step in range(top_k):
                expert = experts[(rank + step) % top_k]
                if scores[expert] >= threshold:
                    continue
                known = False
                for other in row:
                    if other == expert:
                        known = True
                if not known:
                    row[m] = expert
                    confidence[m] = 2
                    break
    for rank in range(top_k):
        s.history[layer, rank] = experts[rank]


# Measuring ----------------------------------------------------------------------------------


class Tally(NamedTuple):
    """What one pass counts. Bin b of a histogram is the score ``low + b``, in quarter units."""

    hits: np.ndarray
    """int64 [L, B]: needed experts among the best of each budget."""
    scored: np.ndarray
    """int64 [L, bins]: scores of all experts, measured half."""
    needed: np.ndarray
    """int64 [L, bins]: scores of the experts that were needed, measured half."""
    warm: np.ndarray
    """int64 [bins]: scores of all experts and layers, second half of the warm-up."""
    budgets: np.ndarray
    """int64 [B]: experts."""
    low: int


@kernel
def _bin(tally, score):
    return min(max(score - tally.low, 0), len(tally.warm) - 1)


@kernel
def _tally_warm(tally, scores):
    for score in scores:
        tally.warm[_bin(tally, score)] += 1


@kernel
def _tally(tally, layer, scores, experts):
    for score in scores:
        tally.scored[layer, _bin(tally, score)] += 1
    for expert in experts:
        score = scores[expert]
        tally.needed[layer, _bin(tally, score)] += 1
        ahead = 0  # experts that come first: higher scores, and equal ones of a lower index
        for e in range(expert):
            ahead += int(scores[e] >= score)
        for e in range(expert + 1, len(scores)):
            ahead += int(scores[e] > score)
        for b in range(len(tally.budgets)):
            tally.hits[layer, b] += int(ahead < tally.budgets[b])


def _compiled(source: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """The loops over some consecutive tokens, which go on where the last call ended.

    Scores before token ``settled`` are not counted, those before ``warm`` count for the choice of
    a threshold, and the rest are measured.

    Numba's cache looks at a function's own file and at what it closes over, not at the functions
    it calls in other files. Closing over ``source``, the checksum of predictor.py, makes a change
    there recompile these loops too.
    """

    @kernel
    def learned(p, s, tally, experts, starts, settled, warm):
        assert source >= 0
        for token in range(len(experts)):
            if starts[token]:
                begin_sequence(p, s)
            for layer in range(p.num_layers):
                used = experts[token, layer]
                if settled <= token < warm:
                    _tally_warm(tally, s.score[layer])
                elif token >= warm:
                    _tally(tally, layer, s.score[layer], used)
                observe(p, s, layer, used)

    @kernel
    def paper(threshold, s, tally, experts, starts, settled, warm):
        scores = np.zeros(s.candidate.shape[1], np.int64)
        for token in range(len(experts)):
            if starts[token]:
                s.history[:] = -1
            for layer in range(experts.shape[1]):
                used = experts[token, layer]
                paper_scores(s, layer, scores)
                if settled <= token < warm:
                    _tally_warm(tally, scores * 4)
                elif token >= warm:
                    _tally(tally, layer, scores * 4, used)
                paper_update(s, layer, used, scores, threshold)

    return learned, paper


_LEARNED, _PAPER = _compiled(zlib.crc32(Path(_predictor.__file__).read_bytes()))


# Results ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplayResult:
    """What a replay measured, in its second half.

    ``coverage`` is the share of needed experts whose score was at least the threshold,
    ``issue_rate`` the number of experts with such a score in units of K, and ``precision`` their
    ratio, None where nothing was issued. ``per_layer`` has lists of the same, by layer.
    """

    tokens: int
    tokens_per_s: float
    recall: dict[str, float]
    coverage: float
    issue_rate: float
    precision: float | None
    per_layer: dict[str, Any]
    predictor: str
    threshold: float
    """Whole units."""
    tokens_measured: int
    sequences: int
    trace: str
    hindsight: dict[str, float | None] | None = None
    """With ``issue_rate``: threshold, coverage, issue rate and precision of the best static
    threshold for the measured half itself, which no engine could have known."""
    preset: str | None = None
    curve: dict[str, list[float]] | None = None
    """With ``curve=True``: ``threshold``, ``issue_rate`` and ``coverage`` of some static thresholds
    in the measured half, from one that issues nothing to one that issues everything."""

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and texts."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.as_dict(), allow_nan=False)


def pick_threshold(histogram: np.ndarray, limit: float, low: int) -> int:
    """The lowest threshold at which at most ``limit`` of the scores pass.

    Parameters
    ----------
    histogram : int [bins]
        How many scores were ``low``, ``low + 1``, ...
    limit : float
        Most scores that may pass.
    low : int
        Score of the first bin.

    Returns
    -------
    int
        ``low`` to ``low + bins``; the last lets nothing pass.
    """
    passing = np.cumsum(histogram[::-1])[::-1]  # never rises with the threshold
    return low + int(np.count_nonzero(passing > limit))


def _threshold_quarters(threshold: float) -> int:
    field = next(f for f in dataclasses.fields(EngineConfig) if f.name == "threshold")
    low, high = field.metadata["low"], field.metadata["high"]
    if not (math.isfinite(threshold) and low <= threshold <= high):
        raise ReplayError(f"threshold must be {low} to {high}, not {threshold:g}")
    quarters = threshold * ONE
    if quarters != int(quarters):
        raise ReplayError(f"threshold must be a multiple of 0.25, not {threshold:g}")
    return int(quarters)


def _score_range(predictor: str, config: EngineConfig) -> tuple[int, int]:
    """Scores told apart, quarter units: as far as they reach and a threshold may lie."""
    if predictor == "paper":
        return 0, (3 * config.top_k + 1) * ONE
    field = next(f for f in dataclasses.fields(EngineConfig) if f.name == "threshold")
    reach = 1 << (config.score_bits - 1)
    low = max(-reach, field.metadata["low"] * ONE)
    return low, min(reach - 1, field.metadata["high"] * ONE + ONE - 1)


def _new_tally(predictor: str, config: EngineConfig) -> Tally:
    low, high = _score_range(predictor, config)
    bins, layers = high - low + 1, config.num_layers
    budgets = [half * config.top_k // 2 for half in BUDGETS.values()]
    return Tally(
        hits=np.zeros((layers, len(budgets)), np.int64),
        scored=np.zeros((layers, bins), np.int64),
        needed=np.zeros((layers, bins), np.int64),
        warm=np.zeros(bins, np.int64),
        budgets=np.array(budgets, np.int64),
        low=low,
    )


def _stepper(
    predictor: str, config: EngineConfig, tally: Tally, *, ordered: bool, candidates: int, gate: int
) -> Callable[[np.ndarray, np.ndarray, int, int], None]:
    """A loop over tokens (see :func:`_compiled`) and its cold tables."""
    if predictor == "learned":
        params: PredictorParams = params_of(config, ordered=ordered)
        state: PredictorState = new_state(config)
        return lambda *tokens: _LEARNED(params, state, tally, *tokens)
    tables = new_paper_state(config, candidates)
    return lambda *tokens: _PAPER(gate, tables, tally, *tokens)


def _compile(predictor: str) -> None:
    """Have the loop compiled, by a few tokens of a small model."""
    config = EngineConfig()
    tally = _new_tally(predictor, config)
    step = _stepper(predictor, config, tally, ordered=True, candidates=2, gate=PAPER_THRESHOLD)
    experts = np.zeros((2, config.num_layers, config.top_k), np.int64)
    experts[:, :, 1] = 1
    step(experts, np.array([True, False]), 0, 1)


def replay_trace(
    trace: Trace,
    config: EngineConfig,
    *,
    predictor: str = "learned",
    threshold: float | None = None,
    issue_rate: float | None = None,
    paper_candidates: int | None = None,
    curve: bool = False,
) -> ReplayResult:
    """Replay a trace and measure its second half.

    Parameters
    ----------
    trace : Trace
    config : EngineConfig
        Of the trace's shape (see :func:`stmoe_golden.traces.config_for`).
    predictor : str
        ``learned`` or ``paper``.
    threshold : float, optional
        Score from which an expert is issued, whole units in steps of a quarter. By default the
        configuration's, and 2 for the paper, whose tables learn with the same threshold.
    issue_rate : float, optional
        Instead, take the lowest static threshold that issues at most this many experts, in units
        of K, over the second half of the warm-up, when the tables are no longer cold. The paper's
        tables then learn with 2.
    paper_candidates : int, optional
        M, the paper's candidates per expert; 2*K by default.
    curve : bool
        Also judge other static thresholds, for coverage against issue rate.

    Raises
    ------
    ReplayError
        An option that is not allowed.
    TraceError
        The trace is not of the configuration's shape, or too short to pick a threshold on.
    """
    check_shape(trace, config)
    if predictor not in PREDICTORS:
        raise ReplayError(f"predictor must be {' or '.join(PREDICTORS)}, not {predictor!r}")
    if threshold is not None and issue_rate is not None:
        raise ReplayError("threshold and issue_rate cannot both be given")
    most = config.num_experts / config.top_k
    if issue_rate is not None and not 0 < issue_rate <= most:
        raise ReplayError(
            f"issue_rate must be above 0 and at most {most:g} (num_experts / top_k), "
            f"not {issue_rate:g}"
        )
    candidates = 2 * config.top_k if paper_candidates is None else paper_candidates
    if not 1 <= candidates <= 256:
        raise ReplayError(f"paper_candidates must be 1 to 256, not {candidates}")
    default = config.threshold if predictor == "learned" else PAPER_THRESHOLD
    quarters = _threshold_quarters(default if threshold is None else threshold)
    warm = trace.num_tokens // 2
    settled = warm // 2
    if issue_rate is not None and warm == 0:
        raise TraceError(f"{trace.name}: has 1 token; picking a threshold needs 2 or more")

    _compile(predictor)
    tally = _new_tally(predictor, config)
    step = _stepper(
        predictor,
        config,
        tally,
        ordered=trace.ordered,
        candidates=candidates,
        gate=-(-quarters // ONE),  # sums are whole
    )
    starts = trace.starts()
    began = time.perf_counter()
    for first in range(0, trace.num_tokens, CHUNK):
        last = min(first + CHUNK, trace.num_tokens)
        experts = trace.experts[first:last].astype(np.int64, order="C")
        step(experts, starts[first:last], settled - first, warm - first)
    elapsed = time.perf_counter() - began

    hindsight = None
    if issue_rate is not None:
        unit = issue_rate * trace.top_k * trace.num_layers
        scored = tally.scored.sum(axis=0)
        quarters = pick_threshold(tally.warm, unit * (warm - settled), tally.low)
        best = pick_threshold(scored, unit * (trace.num_tokens - warm), tally.low)
        if predictor == "paper":  # its sums are whole
            quarters, best = -(-quarters // ONE) * ONE, -(-best // ONE) * ONE
        hindsight = _result(trace, predictor, tally, best, elapsed)
    result = _result(trace, predictor, tally, quarters, elapsed)
    if curve:
        result = dataclasses.replace(result, curve=_curve(trace, tally))
    if hindsight is None:
        return result
    keys = ("threshold", "coverage", "issue_rate", "precision")
    return dataclasses.replace(result, hindsight={key: getattr(hindsight, key) for key in keys})


def _curve(trace: Trace, tally: Tally) -> dict[str, list[float]]:
    """Coverage and issue rate of at most :data:`CURVE_POINTS` thresholds, evenly apart in issue
    rate, and of the two at the ends."""
    needed_experts = (trace.num_tokens - trace.num_tokens // 2) * trace.top_k * trace.num_layers
    # Row n: the n highest bins pass.
    rates = np.zeros((tally.scored.shape[1] + 1, 2))
    for i, histogram in enumerate((tally.scored, tally.needed)):
        rates[1:, i] = np.cumsum(histogram.sum(axis=0)[::-1]) / needed_experts
    rows = np.flatnonzero(np.diff(rates[:, 0], prepend=-1.0))  # the highest of equal thresholds
    wanted = np.linspace(0.0, rates[-1, 0], CURVE_POINTS)
    rows = rows[np.unique(np.searchsorted(rates[rows, 0], wanted).clip(max=len(rows) - 1))]
    return {
        "threshold": ((tally.low + tally.scored.shape[1] - rows) / ONE).tolist(),
        "issue_rate": rates[rows, 0].tolist(),
        "coverage": rates[rows, 1].tolist(),
    }


def _result(
    trace: Trace, predictor: str, tally: Tally, quarters: int, elapsed: float
) -> ReplayResult:
    measured = trace.num_tokens - trace.num_tokens // 2
    scale = measured * trace.top_k  # needed experts of a layer
    first = min(max(quarters - tally.low, 0), len(tally.warm))
    covered = tally.needed[:, first:].sum(axis=1)
    issued = tally.scored[:, first:].sum(axis=1)
    layers = trace.num_layers

    def ratio(covered: Any, issued: Any) -> float | None:
        return float(covered / issued) if issued else None

    return ReplayResult(
        tokens=trace.num_tokens,
        tokens_per_s=round(trace.num_tokens / max(elapsed, 1e-9), 1),
        recall={
            name: float(tally.hits[:, b].sum() / (scale * layers)) for b, name in enumerate(BUDGETS)
        },
        coverage=float(covered.sum() / (scale * layers)),
        issue_rate=float(issued.sum() / (scale * layers)),
        precision=ratio(covered.sum(), issued.sum()),
        per_layer={
            "recall": {name: (tally.hits[:, b] / scale).tolist() for b, name in enumerate(BUDGETS)},
            "coverage": (covered / scale).tolist(),
            "issue_rate": (issued / scale).tolist(),
            "precision": [ratio(c, i) for c, i in zip(covered, issued, strict=True)],
        },
        predictor=predictor,
        threshold=quarters / ONE,
        tokens_measured=measured,
        sequences=trace.num_sequences,
        trace=trace.name,
    )
