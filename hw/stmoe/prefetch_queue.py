# SPDX-License-Identifier: Apache-2.0
"""Selected experts that have not been started."""

from __future__ import annotations

from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .head_queue import HeadQueue
from .payloads import selection_layout

__all__ = ["PrefetchQueue"]


class PrefetchQueue(wiring.Component):
    """Holds one selection until its entries start or are replaced.

    The predictor selects for the nearest layer first, and the highest score first: first in, first
    out keeps that order.

    Members
    -------
    i : In
        Picks of the selector; never blocks when the queue was flushed before a selection.
    o : Out
        The next entry to start. ``o.payload`` is a register's output.
    flush : In
        While high, one entry a cycle is removed (``removed``) and none is offered.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        entry = stream.Signature(selection_layout(config))
        super().__init__({"i": In(entry), "o": Out(entry), "flush": In(1), "removed": Out(1)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.queue = queue = HeadQueue(
            self.i.payload.shape(), depth=max(2, self.config.num_select * self.config.look)
        )
        wiring.connect(m, wiring.flipped(self.i), queue.i)
        m.d.comb += [
            self.o.payload.eq(queue.o.payload),
            self.o.valid.eq(queue.o.valid & ~self.flush),
            self.removed.eq(queue.o.valid & self.flush),
            queue.o.ready.eq(self.flush | self.o.ready),
        ]
        return m
