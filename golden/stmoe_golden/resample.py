# SPDX-License-Identifier: Apache-2.0
"""Routing of one model's shape made from real routing of another's, for tests of that shape."""

from __future__ import annotations

import numpy as np

from .config import EngineConfig
from .traces import Trace

__all__ = ["resampled"]


def resampled(trace: Trace, config: EngineConfig, *, seed: int = 1) -> Trace:
    """A trace of ``config``'s shape from one of another shape, token by token.

    Layer m takes the sets of the trace's layer m (mod its layers), under names of its own: a random
    one-to-one map into its experts, or, where it has fewer, a map that spreads the trace's evenly
    over them. Where that gives fewer than K different experts, those of the layer half the
    trace's depth away follow, under other names, then those of layer m again, and so on; at last
    the lowest that are left. So repeats from token to token, links from layer to layer, uneven load
    and the ends of sequences are the real ones, and how well it can be predicted is not that of
    any model.

    Returns
    -------
    Trace
        As many tokens, heaviest first as far as the trace is; ``info`` says what it is.
    """
    rng = np.random.default_rng(seed)
    layers, experts, top_k = config.num_layers, config.num_experts, config.top_k
    sets = np.empty((trace.num_tokens, layers, top_k), np.uint8 if experts <= 256 else np.uint16)
    for m in range(layers):
        parts = []
        for turn in range(2 * -(-top_k // trace.top_k)):
            source = (m + turn * max(1, trace.num_layers // 2)) % trace.num_layers
            if trace.num_experts <= experts:
                names = rng.permutation(experts)[: trace.num_experts]
            else:
                names = rng.permutation(trace.num_experts) % experts
            parts.append(names[trace.experts[:, source]])
        rest = np.broadcast_to(np.arange(experts), (trace.num_tokens, experts))
        candidates = np.concatenate([*parts, rest], axis=1)
        for token, row in enumerate(candidates):
            _, first = np.unique(row, return_index=True)
            sets[token, m] = row[np.sort(first)[:top_k]]
    info = {
        "model": f"resampled from {trace.info.get('model', trace.name)}",
        "num_layers": layers,
        "num_experts": experts,
        "top_k": top_k,
        "ordered": trace.ordered,
        "source": f"resampled({trace.name}, seed={seed})",
    }
    return Trace(experts=sets, sequence=trace.sequence, info=info)
