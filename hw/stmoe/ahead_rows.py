# SPDX-License-Identifier: Apache-2.0
"""Score rows of the layers that are selected from after the next one."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .score_memory import score_layout

__all__ = ["AheadRows"]


class AheadRows(wiring.Component):
    """Keeps the first ``lookahead`` score rows of a commit, in LUT RAM.

    They are written as the commit makes them, one a cycle (with several folds one fold a cycle), in
    the order of the layers; and read as the selector gets to them, when the score memory may be
    busy with a victim.

    Parameters
    ----------
    config : :class:`EngineConfig`
        Its ``look`` is more than 1.

    Members
    -------
    clear : In
        No row is kept.
    write, fold, row : In
        A row of the commit, or its fold of this number; those after the last kept are not kept.
    distance, read_fold : In
    kept : Out
        Row ``distance`` (0 is the first), combinationally.
    """

    def __init__(self, config: EngineConfig):
        self.config = c = config
        super().__init__(
            {
                "clear": In(1),
                "write": In(1),
                "fold": In(c.fold_bits),
                "row": In(score_layout(c)),
                "distance": In(range(c.look)),
                "read_fold": In(c.fold_bits),
                "kept": Out(score_layout(c)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        folded = c.folds > 1
        fb = c.fold_bits if folded else 0
        # One number: see correlation_table.py.
        m.submodules.rows = rows = memory.Memory(
            shape=unsigned(len(self.row.as_value())), depth=c.look << fb, init=[]
        )
        write, read = rows.write_port(), rows.read_port(domain="comb")
        count = Signal(range(c.look + 1))
        m.d.comb += [
            write.en.eq(self.write & (count != c.look)),
            write.addr.eq(Cat(self.fold[:fb], count)),
            write.data.eq(self.row),
            read.addr.eq(Cat(self.read_fold[:fb], self.distance)),
            self.kept.as_value().eq(read.data),
        ]
        with m.If(write.en & (self.fold == c.folds - 1)):
            m.d.sync += count.eq(count + 1)
        with m.If(self.clear):
            m.d.sync += count.eq(0)
        return m
