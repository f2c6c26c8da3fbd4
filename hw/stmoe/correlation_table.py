# SPDX-License-Identifier: Apache-2.0
"""One bank of rows that learn."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from .learner import DELTA_BITS, RowUpdate
from .synthesis import ANY_ON_COLLISION, GROUPS, IN_BLOCK_RAM, group_registers

__all__ = ["CorrelationTable", "lanes_of_memories"]

WIDE = 256
"""Bits of a row from which on it is kept in block RAM, however few rows there are."""

MEMORY_LANES = 18
"""A memory of several has so many lanes, or a multiple: at 8 bits each they leave no bit unused in
block RAMs of 9, 18, 36 or 72."""


def lanes_of_memories(lanes: int) -> list[int]:
    """How many of a table's lanes each of its memories holds.

    All in one up to twice :data:`MEMORY_LANES`, so few block RAMs that the register of their
    address can be near to all. Otherwise at most :data:`GROUPS` memories, all as wide but the last.
    """
    if lanes <= 2 * MEMORY_LANES:
        return [lanes]
    each = -(-lanes // (GROUPS * MEMORY_LANES)) * MEMORY_LANES
    return [min(each, lanes - first) for first in range(0, lanes, each)]


class CorrelationTable(wiring.Component):
    """Rows of signed saturating weights in block RAM, one read and one write port.

    A wide row lies in several memories side by side (:func:`lanes_of_memories`), which do the same
    at the same time, each by registers of its own: their wires are shorter.

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
        Index of the row that is read, once for each memory.
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
        self.memories = lanes_of_memories(lanes)
        self.row_bits = max(1, (rows - 1).bit_length())
        weights = data.ArrayLayout(signed(width), lanes)
        super().__init__(
            {
                "row": In(self.row_bits * len(self.memories)),
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
        # One number for each row: elaborating an initial value lane by lane takes minutes for a
        # large model. A wide row goes to block RAM even if there are few: the address of LUT RAM
        # goes to every bit.
        attrs = ANY_ON_COLLISION | (IN_BLOCK_RAM if wide else {})
        reads, writes = [], []
        for n, lanes in enumerate(self.memories):
            m.submodules[f"memory_{n}" if n else "memory"] = ram = memory.Memory(
                shape=unsigned(lanes * self.width), depth=max(2, self.rows), init=[], attrs=attrs
            )
            read, write = ram.read_port(), ram.write_port()
            reads.append(read)
            writes.append(write)
        write_rows = group_registers(self.row_bits, len(self.memories), "row_4")
        write_enables = group_registers(1, len(self.memories), "writes")

        delta = Signal(self.delta.shape())
        learn = Signal(2)  # of the rows presented 2 and 3 cycles before
        row = self.row[: self.row_bits]
        rows = [Signal(self.row_bits, name=f"row_{n}") for n in range(1, 4)]
        settled = Signal(3)
        m.d.comb += [
            Cat(read.addr for read in reads).eq(self.row),
            *(read.en.eq(1) for read in reads),
            update.i.eq(self.weights),
            update.delta.eq(delta),
            self.learnt.eq(update.o),
            Cat(write.addr for write in writes).eq(Cat(write_rows)),
            Cat(write.data for write in writes).eq(update.o),
            Cat(write.en for write in writes).eq(Cat(write_enables)),
        ]
        m.d.sync += [
            learn.eq(Cat(self.learn, learn)),
            *(enable.eq(learn[-1]) for enable in write_enables),
            *(after.eq(before) for before, after in zip([row, *rows], rows, strict=False)),
            *(written.eq(rows[-1]) for written in write_rows),
        ]
        with m.If(self.learn):
            m.d.sync += delta.eq(self.delta)
        with m.Else():
            m.d.sync += delta.as_value().eq(0)
        row_read = Cat(read.data for read in reads)
        for lane in range(self.lanes):
            with m.If(self.blank[lane]):
                m.d.sync += self.weights[lane].eq(0)
            with m.Else():
                m.d.sync += self.weights[lane].eq(
                    row_read.word_select(lane, self.width).as_signed()
                )
        with m.If(~self.clear_done):
            # Zeros, which are through the update when the first row is cleared.
            m.d.sync += [
                settled.eq(Cat(1, settled)),
                *(written.eq(0) for written in write_rows),
                *(enable.eq(1) for enable in write_enables),
            ]
            with m.If(settled[-1]):
                m.d.sync += [written.eq(written + 1) for written in write_rows]
                with m.If(write_rows[0] == self.rows - 1):
                    m.d.sync += [
                        self.clear_done.eq(1),
                        *(enable.eq(0) for enable in write_enables),
                    ]
        return m
