# SPDX-License-Identifier: Apache-2.0
"""The engine inside an Amaranth design."""

from __future__ import annotations

from amaranth.hdl import Module
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from stmoe.engine import Engine
from stmoe.payloads import axi4_lite_signature, axi4_read_signature, route_layout, token_layout
from stmoe.register_map import addr_width
from stmoe_golden.config import EngineConfig


class MoeNode(wiring.Component):
    """An engine with its expert buffer on chip, and an accelerator of one cycle an expert.

    ``used`` says which slot is in use in this cycle; ``word`` is the first word of that slot one
    cycle later.
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        super().__init__(
            {
                "token": In(stream.Signature(token_layout(config))),
                "route": In(stream.Signature(route_layout(config))),
                "axi": Out(axi4_read_signature(config)),
                "axil": In(axi4_lite_signature(addr_width(config))),
                "used": Out(1),
                "word": Out(config.axi_data_width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        m.submodules.engine = engine = Engine(c)
        for name in ("token", "route", "axi", "axil"):
            connect(m, flipped(getattr(self, name)), getattr(engine, name))

        # What is loaded goes to the buffer, at once.
        beats = c.slot_beats
        m.submodules.buffer = buffer = memory.Memory(
            shape=c.axi_data_width, depth=c.num_slots * beats, init=[]
        )
        write, read = buffer.write_port(), buffer.read_port()
        m.d.comb += [
            engine.fill.ready.eq(1),
            write.en.eq(engine.fill.valid),
            write.addr.eq(engine.fill.payload.slot * beats + engine.fill.payload.offset),
            write.data.eq(engine.fill.payload.data),
        ]

        # What is granted is used, and released in the same cycle.
        m.d.comb += [
            engine.grant.ready.eq(engine.release.ready),
            engine.release.valid.eq(engine.grant.valid & ~engine.grant.payload.error),
            engine.release.payload.slot.eq(engine.grant.payload.slot),
            self.used.eq(engine.release.valid & engine.release.ready),
            read.addr.eq(engine.grant.payload.slot * beats),
            self.word.eq(read.data),
        ]
        return m
