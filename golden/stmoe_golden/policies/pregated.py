# SPDX-License-Identifier: Apache-2.0
"""Ideal pre-gating: a model that routes each layer one layer early, without a cache."""

from __future__ import annotations

from .oracle import Oracle

__all__ = ["Pregated"]


class Pregated(Oracle):
    """Loads exactly the next layer's set, and drops it after use, as Pre-gated MoE (Hwang et al.,
    ISCA 2024, arXiv 2308.12066) does. Ideal: pre-gating itself is never wrong and costs nothing."""

    name = "pregated"
    keeps = False
    learned = False
