# SPDX-License-Identifier: Apache-2.0
"""The report of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["sweep_page"]


def sweep_page(path: str | Path, result: dict[str, Any]) -> tuple[str, int, list[str]]:
    raise NotImplementedError
