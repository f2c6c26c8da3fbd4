# SPDX-License-Identifier: Apache-2.0
"""Takes one weight out of the predictor's tables, for software to read."""

from __future__ import annotations

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Module, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .expert_map import lane_bits
from .folded_lanes import fold_and_lane

__all__ = ["TableReader", "table_index_layout"]

TABLE_BITS = 3
"""Of a table's number: bias, temporal, and up to six spatial tables."""

GROUP = 16
"""Lanes that are gathered in a step: all at once would be a slow path."""


def table_index_layout(config: EngineConfig) -> data.StructLayout:
    """Which weight: ``table`` 0 is bias, 1 temporal, 1 + d the spatial table of distance d.

    Of ``table``, the row of ``expert`` in ``layer`` (bias has one row for a layer), and of that
    row the lane. All must exist.
    """
    lane = lane_bits(config)
    return data.StructLayout(
        {"table": TABLE_BITS, "layer": config.layer_bits, "expert": lane, "lane": lane}
    )


class TableReader(wiring.Component):
    """Picks a weight from the rows that the tables give, in three registered steps.

    Whoever owns the tables presents the row that ``index`` names (with several folds, the part of
    it that has the lane) in the cycle after each cycle with ``pause``; it is at the inputs two
    cycles later. ``valid`` comes six cycles after a cycle with ``pause``, if ``request`` was high
    in all of them.

    The tables themselves do half of it: in the rows that are presented after a ``pause`` they give
    all lanes but one as 0 (a register's reset costs nothing), so the lanes need only be joined by
    OR. A multiplexer of all rows would be twice the logic.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    bias : In
        Row of the bias table.
    weights : In
        Rows of the temporal table and of spatial tables 1 to D.
    clear_done : In
        The tables have been cleared after reset.
    index : In
        Stable while ``request``, and from a cycle before it.
    request : In
        Stays until ``valid``.
    pause : In
        The row that is presented next may be ours, and what is read of it is settled.
    mute_bias : In
        The bias is of no account: from the cycle after the next on its table gives 0.
    blank, blank_bias : Out
        Lanes that the tables, and that of the bias, give as 0, for :class:`.CorrelationTable`.
    valid : Out
        ``value`` is the weight.
    value : Out
        Signed: a weight, or a bias.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self.config = c = config
        row = data.ArrayLayout(signed(c.weight_bits), c.num_lanes)
        super().__init__(
            {
                "bias": In(data.ArrayLayout(signed(c.bias_bits), c.num_lanes)),
                "weights": In(data.ArrayLayout(row, c.depth + 1)),
                "clear_done": In(1),
                "index": In(table_index_layout(c)),
                "request": In(1),
                "pause": In(1),
                "mute_bias": In(1),
                "blank": Out(c.num_lanes, init=-1),
                "blank_bias": Out(c.num_lanes, init=-1),
                "valid": Out(1),
                "value": Out(signed(c.bias_bits)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        # The tables take the row two cycles after `pause`, one after it is presented.
        pause = Signal()
        m.d.sync += pause.eq(self.pause)
        index_lane = self.index.lane if c.folds == 1 else fold_and_lane(c, self.index.lane)[1]
        blank = Cat(pause & (index_lane != e) for e in range(c.num_lanes))
        for out, all_lanes in (
            (self.blank, ~self.clear_done),
            (self.blank_bias, ~self.clear_done | self.mute_bias),
        ):
            with m.If(all_lanes):
                m.d.sync += out.eq(-1)
            with m.Else():
                m.d.sync += out.eq(blank)

        picked = []
        for table, row in enumerate([self.bias, *(self.weights[d] for d in range(c.depth + 1))]):
            width = c.weight_bits if table else c.bias_bits
            groups = []
            for first in range(0, c.num_lanes, GROUP):
                group = Signal(width, name=f"group_{table}_{first // GROUP}")
                lanes = [row[e] for e in range(first, min(first + GROUP, c.num_lanes))]
                m.d.sync += group.eq(reduce(or_, lanes))
                groups.append(group)
            lane = Signal(signed(width), name=f"picked_{table}")
            m.d.sync += lane.eq(reduce(or_, groups))
            picked.append(lane)
        # Beside what it chooses from: `index` is far away, and stands long before.
        chosen = Signal.like(self.index.table)
        m.d.sync += chosen.eq(self.index.table)
        with m.Switch(chosen):
            for table, lane in enumerate(picked):
                with m.Case(table):
                    m.d.sync += self.value.eq(lane)
        # Row presented, in the RAM's register, in the table's, lane found (two), table picked.
        steps = Signal(unsigned(6))
        with m.If(self.request & ~self.valid):
            m.d.sync += steps.eq(steps << 1 | self.pause)
        with m.Else():
            m.d.sync += steps.eq(0)
        m.d.comb += self.valid.eq(steps[-1] & self.request)
        return m
