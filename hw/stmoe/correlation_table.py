# SPDX-License-Identifier: Apache-2.0
"""One bank of rows that learn."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from .learner import DELTA_BITS, RowUpdate
from .synthesis import ANY_ON_COLLISION, IN_BLOCK_RAM

__all__ = ["CorrelationTable"]

WIDE = 256
"""Bits of a row from which on it is kept in block RAM, however few rows there are."""


class CorrelationTable(wiring.Component):
    """Rows of signed saturating weights in block RAM, one read and one write port.

    A row presented in cycle t is at ``weights`` in cycle t+2: a register takes what the block RAM
    is slow to give. With ``learn`` in cycle t+1 the ``delta`` of that cycle is added to it, and
    ``learnt`` is the result, or the row as it was, in cycle t+4. It is written in that cycle:
    reads presented from cycle t+5 on see it, so the same row must not be presented for learning
    again before; what a read of it in cycle t+4 gives is undefined. A new row may be presented
    every cycle.

    After reset all rows are cleared, one a cycle; until ``clear_done`` ``learn`` must be low and
    every bit of ``blank`` high.

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
        The row presented one cycle before is corrected.
    delta : In
        Correction of each lane, with ``learn``.
    blank : In
        Lanes of the row presented one cycle before that are given as 0.
    weights : Out
        The row presented two cycles before.
    learnt : Out
        The row presented four cycles before, after learning.
    clear_done : Out
    """

    def __init__(self, *, rows: int, lanes: int, width: int):
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows must be 1 or more, not {rows!r}")
        self.rows, self.lanes, self.width = rows, lanes, width
        self.update = RowUpdate(lanes=lanes, width=width)
        weights = data.ArrayLayout(signed(width), lanes)
        super().__init__(
            {
                "row": In(range(max(2, rows))),
                "learn": In(1),
                "delta": In(data.ArrayLayout(signed(DELTA_BITS), lanes)),
                "blank": In(lanes),
                "weights": Out(weights),
                "learnt": Out(weights),
                "clear_done": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.update = update = self.update
        wide = self.weights.shape().size >= WIDE
        m.submodules.memory = ram = memory.Memory(
            # One number for each row: elaborating an initial value lane by lane takes minutes for
            # a large model.
            shape=unsigned(self.weights.shape().size),
            depth=max(2, self.rows),
            init=[],
            # A wide row goes to block RAM even if there are few: the address of LUT RAM goes to
            # every bit.
            attrs=ANY_ON_COLLISION | (IN_BLOCK_RAM if wide else {}),
        )
        read, write = ram.read_port(), ram.write_port()

        delta = Signal(self.delta.shape())
        learn = Signal(2)  # of the rows presented 2 and 3 cycles before
        rows = [Signal.like(self.row, name=f"row_{n}") for n in range(1, 5)]
        row_write, settled = rows[-1], Signal(3)
        writes = Signal()
        m.d.comb += [
            read.addr.eq(self.row),
            read.en.eq(1),
            update.i.eq(self.weights),
            update.delta.eq(delta),
            self.learnt.eq(update.o),
            write.addr.eq(row_write),
            write.data.eq(update.o),
            write.en.eq(writes),
        ]
        m.d.sync += [
            learn.eq(Cat(self.learn, learn)),
            writes.eq(learn[-1]),
            *(after.eq(before) for before, after in zip([self.row, *rows], rows, strict=False)),
        ]
        with m.If(self.learn):
            m.d.sync += delta.eq(self.delta)
        with m.Else():
            m.d.sync += delta.as_value().eq(0)
        for lane in range(self.lanes):
            with m.If(self.blank[lane]):
                m.d.sync += self.weights[lane].eq(0)
            with m.Else():
                m.d.sync += self.weights[lane].eq(
                    read.data.word_select(lane, self.width).as_signed()
                )
        with m.If(~self.clear_done):
            # Zeros, which are through the update when the first row is cleared.
            m.d.sync += [settled.eq(Cat(1, settled)), row_write.eq(0), writes.eq(1)]
            with m.If(settled[-1]):
                m.d.sync += row_write.eq(row_write + 1)
                with m.If(row_write == self.rows - 1):
                    m.d.sync += [self.clear_done.eq(1), writes.eq(0)]
        return m
