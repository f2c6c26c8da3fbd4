# SPDX-License-Identifier: Apache-2.0
"""Seeded synthetic routing with the locality that real models show, for tests."""

from __future__ import annotations

import numpy as np

from .traces import Trace

__all__ = ["markov_trace"]


def markov_trace(
    *,
    num_tokens: int = 1000,
    num_layers: int = 4,
    num_experts: int = 8,
    top_k: int = 2,
    num_sequences: int = 4,
    spatial: float = 3.0,
    temporal: float = 1.5,
    skew: float = 1.0,
    noise: float = 1.0,
    seed: int = 1,
) -> Trace:
    """Routing in which a layer's set depends on the layer before it and on the token before.

    A set is the ``top_k`` experts of largest logit, heaviest first. The logit is a fixed
    preference of the layer (``skew``), plus what a fixed random matrix says of the set of the
    layer before (``spatial``; for layer 0 that of the last layer, one token ago), plus
    ``temporal`` for each expert of the previous token's set, plus Gaussian ``noise``. History
    ends with each of ``num_sequences`` sequences of about equal length. With all three strengths
    0 the routing is uniform and nothing can be predicted.
    """
    rng = np.random.default_rng(seed)
    preference = skew * rng.standard_normal((num_layers, num_experts))
    links = rng.standard_normal((num_layers, num_experts, num_experts)) * spatial / top_k**0.5
    experts = np.empty(
        (num_tokens, num_layers, top_k), np.uint8 if num_experts <= 256 else np.uint16
    )
    sequence = (np.arange(num_tokens) * num_sequences // max(1, num_tokens)).astype(np.int32)
    for token in range(num_tokens):
        fresh = token == 0 or sequence[token] != sequence[token - 1]
        jitter = noise * rng.standard_normal((num_layers, num_experts))
        for layer in range(num_layers):
            logit = preference[layer] + jitter[layer]
            if layer > 0:
                logit += links[layer, experts[token, layer - 1]].sum(0)
            elif not fresh:
                logit += links[0, experts[token - 1, num_layers - 1]].sum(0)
            if not fresh:
                logit[experts[token - 1, layer]] += temporal
            experts[token, layer] = np.argsort(-logit, kind="stable")[:top_k]
    info = {
        "model": "synthetic",
        "num_layers": num_layers,
        "num_experts": num_experts,
        "top_k": top_k,
        "phase": "decode",
        "source": f"markov_trace(seed={seed})",
    }
    return Trace(experts=experts, sequence=sequence, info=info)
