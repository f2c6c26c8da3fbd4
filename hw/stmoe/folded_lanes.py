# SPDX-License-Identifier: Apache-2.0
"""Which fold, and which lane of it, an expert is where the datapath is narrower than a layer."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Mux, Value

from stmoe_golden.config import EngineConfig

__all__ = ["expert_of", "fold_and_lane", "sublane_bits"]


def sublane_bits(config: EngineConfig) -> int:
    """Bits of a lane's index within a fold."""
    return max(1, (config.num_lanes - 1).bit_length())


def _shift(config: EngineConfig) -> int | None:
    """log2 of ``num_lanes`` where it is a power of two: the index is cut there, at no cost."""
    lanes = config.num_lanes
    return None if lanes & (lanes - 1) else lanes.bit_length() - 1


def fold_and_lane(config: EngineConfig, expert: Value) -> tuple[Value, Value]:
    """Fold (``fold_bits``) and lane within it (:func:`sublane_bits`) of an expert of the model."""
    lanes, shift = config.num_lanes, _shift(config)
    if shift is not None:
        fold = Cat(expert[shift:], Const(0, config.fold_bits))[: config.fold_bits]
        return fold, Cat(expert[:shift], Const(0, 1))[: sublane_bits(config)]
    fold, first = Const(0, config.fold_bits), Const(0, len(expert))
    for n in range(1, config.folds):
        beyond = expert >= n * lanes
        fold = Mux(beyond, Const(n, config.fold_bits), fold)
        first = Mux(beyond, Const(n * lanes, len(expert)), first)
    return fold, (expert - first)[: sublane_bits(config)]


def expert_of(config: EngineConfig, fold: Value, lane: Value) -> Value:
    """The expert of a lane of a fold."""
    shift = _shift(config)
    if shift is not None:
        return Cat(lane[:shift], fold)
    return (fold * config.num_lanes + lane)[: (config.num_experts - 1).bit_length()]
