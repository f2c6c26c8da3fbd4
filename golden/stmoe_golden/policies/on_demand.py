# SPDX-License-Identifier: Apache-2.0
"""No cache at all: every expert is loaded when it is needed."""

from __future__ import annotations

from .base import Policy

__all__ = ["OnDemand"]


class OnDemand(Policy):
    """Loads each layer's experts after its routing, and drops them after use."""

    name = "on_demand"
    keeps = False
