# SPDX-License-Identifier: Apache-2.0
"""A queue whose head is a register, so that what reads it starts from flip-flops."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

__all__ = ["HeadQueue"]


class HeadQueue(wiring.Component):
    """First in, first out; the first entry lies in a register, the others in LUT RAM.

    What is taken from ``i`` in one cycle is on ``o`` in the next when nothing is before it. One
    entry a cycle passes in each direction.

    Parameters
    ----------
    shape : :py:`ShapeLike`
        Payload of both streams.
    depth : int
        Entries that it holds, 1 or more; room for some more comes at no cost and is used.

    Members
    -------
    i : :py:`In(stream.Signature(shape))`
        ``i.ready`` depends on registers alone.
    o : :py:`Out(stream.Signature(shape))`
        ``o.valid`` and ``o.payload`` are registers' outputs.
    second_valid, second : :py:`Out(1)`, :py:`Out(shape)`
        The entry behind the head, if any; combinational from registers and LUT RAM.
    """

    def __init__(self, shape, *, depth: int):
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be 1 or more, not {depth!r}")
        # The LUT RAM is full with one word unused: then its two addresses differ.
        self._others = 1 << max(1, (depth - 1).bit_length())
        super().__init__(
            {
                "i": In(stream.Signature(shape)),
                "o": Out(stream.Signature(shape)),
                "second_valid": Out(1),
                "second": Out(shape),
            }
        )

    def elaborate(self, platform):
        m = Module()
        incoming = Value.cast(self.i.payload)
        replace = Signal()
        pushed = Signal()
        m.submodules.others = others = Memory(shape=len(incoming), depth=self._others, init=[])
        write, read = others.write_port(), others.read_port(domain="comb")
        m.d.comb += [
            self.i.ready.eq((write.addr + 1)[: len(write.addr)] != read.addr),
            self.second_valid.eq(write.addr != read.addr),
            Value.cast(self.second).eq(read.data),
            write.data.eq(incoming),
            write.en.eq(pushed),
        ]
        with m.If(pushed):
            m.d.sync += write.addr.eq(write.addr + 1)
        with m.If(replace & self.second_valid):
            m.d.sync += read.addr.eq(read.addr + 1)
        m.d.comb += [
            replace.eq(self.o.ready | ~self.o.valid),
            pushed.eq(self.i.valid & self.i.ready & (self.second_valid | ~replace)),
        ]
        with m.If(replace):
            m.d.sync += [
                self.o.valid.eq(self.i.valid | self.second_valid),
                Value.cast(self.o.payload).eq(Mux(self.second_valid, self.second, incoming)),
            ]
        return m
