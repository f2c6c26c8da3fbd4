# SPDX-License-Identifier: Apache-2.0
"""One bank of rows that learn."""

from __future__ import annotations

from amaranth.hdl import Module, Signal, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from .learner import DELTA_BITS, RowUpdate

__all__ = ["CorrelationTable"]


class CorrelationTable(wiring.Component):
    """Rows of signed saturating weights in block RAM, one read and one write port.

    A row presented in cycle t is out in cycle t+1. If it was presented with ``learn``, the
    ``delta`` of cycle t+1 is added to it and the result is written in cycle t+2: reads presented
    from cycle t+3 on see it, so the same row must not be presented for learning again before.
    A new row may be presented every cycle.

    After reset all rows are cleared, one a cycle; ``learn`` must be low until ``clear_done``.

    Parameters
    ----------
    rows : int
    lanes : int
    width : int
        Bits of a weight.

    Members
    -------
    row : In
        Index of the row that is read.
    learn : In
        This row is corrected.
    delta : In
        Correction of each lane, one cycle after the row was presented.
    weights : Out
        The row presented one cycle before.
    clear_done : Out
    """

    def __init__(self, *, rows: int, lanes: int, width: int):
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows must be 1 or more, not {rows!r}")
        self.rows, self.lanes, self.width = rows, lanes, width
        self.update = RowUpdate(lanes=lanes, width=width)
        super().__init__(
            {
                "row": In(range(max(2, rows))),
                "learn": In(1),
                "delta": In(data.ArrayLayout(signed(DELTA_BITS), lanes)),
                "weights": Out(data.ArrayLayout(signed(width), lanes)),
                "clear_done": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.update = update = self.update
        m.submodules.memory = ram = memory.Memory(
            # One number for each row: elaborating an initial value lane by lane takes minutes for
            # a large model.
            shape=unsigned(self.weights.shape().size),
            depth=max(2, self.rows),
            init=[],
        )
        read, write = ram.read_port(), ram.write_port()

        learn_read, learn_write = Signal(), Signal()
        row_read, row_write = Signal.like(self.row), Signal.like(self.row)
        updated = Signal(self.weights.shape())
        m.d.comb += [
            read.addr.eq(self.row),
            read.en.eq(1),
            self.weights.as_value().eq(read.data),
            update.i.as_value().eq(read.data),
            update.delta.eq(self.delta),
            write.addr.eq(row_write),
            write.data.eq(updated),
            write.en.eq(learn_write | ~self.clear_done),
        ]
        m.d.sync += [
            learn_read.eq(self.learn),
            row_read.eq(self.row),
            learn_write.eq(learn_read),
            row_write.eq(row_read),
        ]
        with m.If(learn_read):
            # Still 0 while rows are cleared, as nothing has learned yet: no multiplexer.
            m.d.sync += updated.eq(update.o)
        with m.If(~self.clear_done):
            m.d.sync += row_write.eq(row_write + 1)
            with m.If(row_write == self.rows - 1):
                m.d.sync += self.clear_done.eq(1)
        return m
