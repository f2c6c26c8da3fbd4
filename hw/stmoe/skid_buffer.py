# SPDX-License-Identifier: Apache-2.0
"""Registers a stream in both directions, at full throughput."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["SkidBuffer"]


class SkidBuffer(wiring.Component):
    """One register on the payload and one on ``ready``, so no path crosses it.

    A beat taken from ``i`` in one cycle is on ``o`` in the next when nothing is before it. One
    beat passes per cycle; two are held while ``o`` stalls.

    Parameters
    ----------
    shape : :py:`ShapeLike`
        Payload of both streams.

    Members
    -------
    i : :py:`In(stream.Signature(shape))`
        ``i.ready`` is a register's output.
    o : :py:`Out(stream.Signature(shape))`
        ``o.valid`` and ``o.payload`` are registers' outputs.
    """

    def __init__(self, shape):
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        spare = Signal.like(self.o.payload)
        spare_valid = Signal()

        m.d.comb += self.i.ready.eq(~spare_valid)
        with m.If(self.o.ready | ~self.o.valid):
            m.d.sync += [
                self.o.valid.eq(self.i.valid | spare_valid),
                spare_valid.eq(0),
            ]
            with m.If(spare_valid):
                m.d.sync += self.o.payload.eq(spare)
            with m.Else():
                m.d.sync += self.o.payload.eq(self.i.payload)
        with m.Elif(self.i.valid & self.i.ready):
            m.d.sync += [spare.eq(self.i.payload), spare_valid.eq(1)]
        return m
