# SPDX-License-Identifier: Apache-2.0
"""What a routing trace says about itself: locality, skew and how far one step predicts the next.

Every figure stands beside what chance would give, of two kinds: *uniform*, K experts drawn at
random, and *load*, independent tokens that use each layer's experts as often as the trace does.
Only what is beyond the second is locality that a prefetcher can use; the gap between the two is
what a static hot list can. Cells without routing (:attr:`Trace.present`) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from .traces import DECODE, PREFILL, Trace

__all__ = ["LAGS", "repeat_rate", "statistics_text", "trace_statistics"]

LAGS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens back at which the repeat rate is taken."""

CHUNK = 4096
DRAWS = 64
"""Random loads that the expected share of the busiest expert is taken from."""

kernel = njit(cache=True)


@kernel
def _repeats(experts, present, sequence, lags, num_experts, kept, pairs):
    """``kept[lag, l]``: experts of layer l used again after so many tokens, of ``pairs * K``."""
    tokens, layers, top_k = experts.shape
    used = np.zeros(num_experts, np.bool_)
    for token in range(tokens):
        for layer in range(layers):
            if not present[token, layer]:
                continue
            for k in range(top_k):
                used[experts[token, layer, k]] = True
            for n in range(len(lags)):
                before = token - lags[n]
                if before < 0 or sequence[before] != sequence[token]:
                    break
                if not present[before, layer]:
                    continue
                pairs[n, layer] += 1
                for k in range(top_k):
                    kept[n, layer] += used[experts[before, layer, k]]
            for k in range(top_k):
                used[experts[token, layer, k]] = False


@kernel
def _best(scores, limit, taken, picks):
    """The ``limit`` best scores, ties to the lowest index."""
    taken[:] = False
    for n in range(limit):
        best = -1
        for e in range(len(scores)):
            if not taken[e] and (best < 0 or scores[e] > scores[best]):
                best = e
        taken[best] = True
        picks[n] = best


@kernel
def _recalls(experts, present, sequence, measured, num_experts, hits, needed):
    """Online recall at K of three predictors, added to ``hits[p, l]``, of ``needed[p, l]``.

    0 counts how often each expert was used; 1 adds up, over the previous layer's set, how often
    each expert followed it, as shares; 2 does so over the previous token's set in the layer.
    Each is asked before it is told, from empty counts; only tokens from ``measured`` on count.
    """
    tokens, layers, top_k = experts.shape
    popular = np.zeros((layers, num_experts), np.float32)
    follows = np.zeros((2, layers, num_experts, num_experts), np.float32)
    seen = np.zeros((2, layers, num_experts), np.float32)
    scores = np.zeros(num_experts)
    taken = np.zeros(num_experts, np.bool_)
    picks = np.zeros(top_k, np.int64)
    for token in range(tokens):
        for layer in range(layers):
            if not present[token, layer]:
                continue
            now = experts[token, layer]
            for p in range(3):
                if p == 1 and (layer == 0 or not present[token, layer - 1]):
                    continue
                if p == 2 and (
                    token == 0
                    or sequence[token - 1] != sequence[token]
                    or not present[token - 1, layer]
                ):
                    continue
                before = experts[token, layer - 1] if p == 1 else experts[token - 1, layer]
                if token >= measured:
                    if p == 0:
                        scores[:] = popular[layer]
                    else:
                        scores[:] = 0
                        for i in before:
                            if seen[p - 1, layer, i] > 0:
                                scale = 1 / seen[p - 1, layer, i]
                                for e in range(num_experts):
                                    scores[e] += follows[p - 1, layer, i, e] * scale
                    _best(scores, top_k, taken, picks)
                    for expert in now:
                        hits[p, layer] += taken[expert]
                    needed[p, layer] += top_k
                if p > 0:
                    for i in before:
                        seen[p - 1, layer, i] += 1
                        for expert in now:
                            follows[p - 1, layer, i, expert] += 1
            for expert in now:
                popular[layer, expert] += 1


def _shares(hits: np.ndarray, of: np.ndarray) -> dict[str, Any]:
    """The share over all layers, and of each; None where there is nothing to take one of."""
    total = int(of.sum())
    return {
        "mean": float(hits.sum() / total) if total else None,
        "by_layer": [float(h / n) if n else None for h, n in zip(hits, of, strict=True)],
    }


def _busiest_by_chance(events: int, num_experts: int, top_k: int) -> float:
    """Expected use of the busiest expert over the mean, if all were equally likely."""
    draws = np.random.default_rng(0).binomial(events, top_k / num_experts, (DRAWS, num_experts))
    return float(draws.max(axis=1).mean() / (events * top_k / num_experts))


def _load(trace: Trace, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Uses of each expert [L, E], and events [L]."""
    load = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    for start in range(0, trace.num_tokens, CHUNK):
        here = present[start : start + CHUNK]
        for layer in range(trace.num_layers):
            used = trace.experts[start : start + CHUNK, layer][here[:, layer]]
            load[layer] += np.bincount(used.ravel(), minlength=trace.num_experts)
    return load, present.sum(axis=0)


def _present(trace: Trace) -> np.ndarray:
    """bool [T, L]: cells with routing."""
    if trace.present is not None:
        return trace.present
    return np.ones((trace.num_tokens, trace.num_layers), np.bool_)


def _repeat_counts(
    trace: Trace, present: np.ndarray, lags: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [lags, L]: experts used again after so many tokens, and pairs of tokens."""
    kept = np.zeros((len(lags), trace.num_layers), np.int64)
    pairs = np.zeros_like(kept)
    _repeats(trace.experts, present, trace.sequence, np.array(lags), trace.num_experts, kept, pairs)
    return kept, pairs


def repeat_rate(trace: Trace) -> float:
    """Share of experts that the token before used in the same layer, within a sequence; 0 where
    no sequence has two tokens."""
    kept, pairs = _repeat_counts(trace, _present(trace), (1,))
    return float(kept.sum() / max(1, pairs.sum() * trace.top_k))


def trace_statistics(trace: Trace) -> dict[str, Any]:
    """Everything that ``stmoe trace info`` prints, as plain numbers, lists and texts.

    ``repeat_rate``
        by lag in tokens: the share of the experts of a token and layer that the same sequence
        uses again so many tokens later. ``chance`` has ``uniform`` K/E and ``load``, the sum of
        the squares of the experts' probabilities of being used, over K.
    ``load``
        ``busiest`` is the use of a layer's busiest expert over the mean; ``effective_experts``
        the exponential of the entropy of use, E when all are used alike; ``idle_experts`` those
        never used; ``top_quarter`` the share of uses that the busiest quarter of the experts has.
    ``first_order_recall``
        recall at K in the second half of the tokens, online from empty counts: from the
        previous layer's set, from the previous token's, and by ``chance``: ``uniform`` K/E, and
        ``popularity``, the K experts used most so far.
    """
    layers, num_experts, top_k = trace.num_layers, trace.num_experts, trace.top_k
    present = _present(trace)
    load, events = _load(trace, present)
    probability = load / np.maximum(1, events)[:, None]  # of being in a set
    share = probability / top_k
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1)

    kept, pairs = _repeat_counts(trace, present, LAGS)
    hits = np.zeros((3, layers), np.int64)
    needed = np.zeros((3, layers), np.int64)
    measured = trace.num_tokens // 2
    _recalls(trace.experts, present, trace.sequence, measured, num_experts, hits, needed)

    lengths = np.diff(np.append(np.flatnonzero(trace.starts()), trace.num_tokens))
    uniform = top_k / num_experts
    busy = events > 0
    quarter = max(1, num_experts // 4)
    counts: dict[str, int | None] = {"prefill": None, "decode": None}
    if trace.phase is not None:
        counts = {
            "prefill": int(np.count_nonzero(trace.phase == PREFILL)),
            "decode": int(np.count_nonzero(trace.phase == DECODE)),
        }
    return {
        "trace": trace.name,
        "model": trace.info.get("model"),
        "source": trace.info.get("source"),
        "tokens": trace.num_tokens,
        "sequences": trace.num_sequences,
        "sequence_tokens": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "num_layers": layers,
        "num_experts": num_experts,
        "top_k": top_k,
        "ordered": trace.ordered,
        "weights": trace.weights is not None,
        "token_ids": (None if trace.token_id is None else int(len(np.unique(trace.token_id)))),
        "phase": trace.info.get("phase") if trace.phase is None else "by token",
        "phase_tokens": counts,
        "missing_cells": int(present.size - events.sum()),
        "incomplete_tokens": int(np.count_nonzero(~present.all(axis=1))),
        "expert_bytes": trace.expert_bytes,
        "repeat_rate": {
            "by_lag": {
                str(lag): _shares(kept[n], pairs[n] * top_k)
                for n, lag in enumerate(LAGS)
                if pairs[n].any()
            },
            "chance": {
                "uniform": uniform,
                "load": _mean((probability**2).sum(axis=1)[busy] / top_k),
            },
        },
        "load": {
            "busiest": _figures(load.max(axis=1) * num_experts / np.maximum(1, events * top_k)),
            "busiest_by_chance": _busiest_by_chance(
                max(1, round(events[busy].mean())) if busy.any() else 1, num_experts, top_k
            ),
            "top_quarter": _figures(-np.sort(-share, axis=1)[:, :quarter].sum(axis=1)),
            "top_quarter_by_chance": quarter / num_experts,
            "effective_experts": _figures(np.exp(entropy)),
            "idle_experts": int(np.count_nonzero(load == 0)),
        },
        "first_order_recall": {
            "previous_layer": _shares(hits[1], needed[1]),
            "previous_token": _shares(hits[2], needed[2]),
            "chance": {"uniform": uniform, "popularity": _shares(hits[0], needed[0])},
        },
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _figures(values: np.ndarray) -> dict[str, Any]:
    return {
        "mean": _mean(values),
        "by_layer": [float(v) for v in values],
        "max": float(values.max()),
    }


def _percent(value: float | None) -> str:
    return "     -" if value is None else f"{100 * value:5.1f}%"


def statistics_text(found: dict[str, Any]) -> str:
    """The same as a page of text."""
    lengths, phases = found["sequence_tokens"], found["phase_tokens"]
    phase = found["phase"] or "not stated"
    if phases["prefill"] is not None:
        phase = f"{phases['prefill']} prefill, {phases['decode']} decode"
    sizes = found["expert_bytes"]
    size = "not stated"
    if sizes:
        size = (
            f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
        )
    repeat, load, recall = found["repeat_rate"], found["load"], found["first_order_recall"]
    lags = repeat["by_lag"]
    chance = repeat["chance"]
    lines = [
        f"{found['trace']}: {found['tokens']:,} tokens of {found['sequences']:,} sequences "
        f"({lengths['min']} to {lengths['max']}, median {lengths['median']:g})",
        f"model           {found['model'] or 'not stated'}",
        f"shape           {found['num_layers']} layers x {found['num_experts']} experts, "
        f"top-{found['top_k']}, {'heaviest first' if found['ordered'] else 'no order'}",
        f"phase           {phase}",
        f"missing         {found['missing_cells']:,} cells; {found['incomplete_tokens']:,} tokens "
        "lack a layer",
        f"expert bytes    {size}",
        "",
        "repeat rate, by lag in tokens",
        "  " + "  ".join(f"{lag:>6}" for lag in lags) + "  uniform    load",
        "  "
        + "  ".join(_percent(rate["mean"]) for rate in lags.values())
        + f"   {_percent(chance['uniform'])}  {_percent(chance['load'])}",
        "",
        "recall at K in the second half, one step",
        f"  previous layer  {_percent(recall['previous_layer']['mean'])}",
        f"  previous token  {_percent(recall['previous_token']['mean'])}",
        f"  popularity      {_percent(recall['chance']['popularity']['mean'])}  (chance, by load)",
        f"  uniform         {_percent(recall['chance']['uniform'])}  (chance)",
        "",
        "load of the experts                   mean     worst    chance",
        f"  busiest expert over the mean    {load['busiest']['mean']:8.2f}  "
        f"{load['busiest']['max']:8.2f}  {load['busiest_by_chance']:8.2f}",
        f"  share of the busiest quarter    {load['top_quarter']['mean']:8.3f}  "
        f"{load['top_quarter']['max']:8.3f}  {load['top_quarter_by_chance']:8.3f}",
        f"  effective experts               {load['effective_experts']['mean']:8.1f}  "
        f"{min(load['effective_experts']['by_layer']):8.1f}  {found['num_experts']:8}",
        f"  experts never used              {load['idle_experts']:8}",
    ]
    return "\n".join(lines) + "\n"
