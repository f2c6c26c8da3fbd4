# SPDX-License-Identifier: Apache-2.0
"""One record per architectural event, in order, none lost."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .payloads import CONTEXT_BITS, CYCLE_BITS, event_layout
from .slot_manager import record_layout

__all__ = ["SOURCES", "EventPort"]

SOURCES = ("last_beat", "retry", "operation", "selection", "burst", "grant")
"""Where records come from, in the order they have within one cycle."""


class EventPort(wiring.Component):
    """Collects the records of a cycle and delivers them one at a time.

    All records of one cycle enter a FIFO as one entry and leave in the order of :data:`SOURCES`.
    When fewer than ``event_margin`` entries are left, ``hold`` keeps the engine from beginning
    anything new, so no record is ever lost.

    Parameters
    ----------
    config : :class:`EngineConfig`
        Uses ``event_depth`` and ``event_margin``.

    Members
    -------
    cycle : In
        The engine's time base.
    last_beat, retry, operation, selection, burst, grant : In
        Records of this cycle (:func:`stmoe.slot_manager.record_layout`).
    events : Out
        Records with their cycle (:func:`stmoe.payloads.event_layout`).
    hold : Out
        Fewer than ``event_margin`` entries are left.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        super().__init__(
            {
                "cycle": In(CYCLE_BITS),
                **{name: In(record_layout(config)) for name in SOURCES},
                "events": Out(stream.Signature(event_layout(config))),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        # A field that a source never sets is constant zero and costs nothing after synthesis.
        entry = data.StructLayout(
            {"cycle": CYCLE_BITS, **{name: record_layout(c) for name in SOURCES}}
        )
        m.submodules.fifo = queue = fifo.SyncFIFOBuffered(width=entry.size, depth=c.event_depth)
        incoming = Signal(entry)
        m.d.sync += incoming.cycle.eq(self.cycle)
        for name in SOURCES:
            m.d.sync += incoming[name].eq(getattr(self, name))
        m.d.comb += [
            queue.w_data.eq(incoming),
            queue.w_en.eq(Cat(incoming[name].valid for name in SOURCES).any()),
        ]
        # A record reaches `level` two cycles after it was sent, and `hold` is a register.
        m.d.sync += self.hold.eq(queue.level >= c.event_depth - c.event_margin - 2)

        head = Signal(entry)
        waiting = Signal(len(SOURCES))
        m.d.comb += head.eq(queue.r_data)
        done = Signal(len(SOURCES))
        m.d.comb += waiting.eq(Cat(head[name].valid for name in SOURCES) & ~done)
        chosen = Signal(len(SOURCES))
        record = Signal(record_layout(c))
        for index in reversed(range(len(SOURCES))):
            with m.If(waiting[index]):
                m.d.comb += [chosen.eq(1 << index), record.eq(head[SOURCES[index]])]
        # One value for the whole payload: a bit assigned alone to a constant would become an
        # `always @*` that no Verilog simulator ever runs.
        fields = {"cycle": head.cycle, "context": Const(0, CONTEXT_BITS)}
        layout = event_layout(c)
        m.d.comb += [
            self.events.payload.as_value().eq(
                Cat(fields[name] if name in fields else record[name] for name in layout.members)
            ),
            self.events.valid.eq(queue.r_rdy),
        ]
        with m.If(self.events.valid & self.events.ready):
            with m.If((waiting & ~chosen) == 0):
                m.d.comb += queue.r_en.eq(1)
                m.d.sync += done.eq(0)
            with m.Else():
                m.d.sync += done.eq(done | chosen)
        return m
