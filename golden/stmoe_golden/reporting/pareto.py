# SPDX-License-Identifier: Apache-2.0
"""Pareto fronts of two things that are both to be small."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pareto_front"]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats, by the first coordinate.

    A point is beaten by one that is no larger in both coordinates and smaller in one. Of equal
    points the first is kept.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    front: list[int] = []
    least = float("inf")
    for i in order:
        if points[i][1] < least:
            least = points[i][1]
            front.append(i)
    return front
