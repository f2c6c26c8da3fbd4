# SPDX-License-Identifier: Apache-2.0
"""How Numba compiles the golden functions that make no array."""

from __future__ import annotations

from typing import Any

__all__ = ["NO_ARRAY_MADE"]

NO_ARRAY_MADE: dict[str, Any] = {"cache": True, "_nrt": False}
"""Options of ``njit`` that leave out reference counts, which took more than half of a timed run.

Whoever calls such a function holds the arrays that it passes. Numba compiles functions of its own
like this, and refuses to compile one that makes an array.
"""
