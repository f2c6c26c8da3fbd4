# SPDX-License-Identifier: Apache-2.0
"""The engine with conventional flat AXI names, and its Verilog."""

from __future__ import annotations

from amaranth.hdl import Cat, ClockDomain, ClockSignal, Module, ResetSignal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .axi_cdc import AxiReadCrossing, CrossingReset
from .axi_flat import (
    connect_axi4_read,
    connect_axi4_write,
    flat_axi4_read_ports,
    flat_axi4_write_ports,
)
from .axil_flat import connect_axil, flat_axil_ports
from .engine import Engine
from .payloads import (
    event_layout,
    fill_layout,
    grant_layout,
    release_layout,
    route_layout,
    token_layout,
)
from .register_map import addr_width
from .verilog_writer import convert

__all__ = ["EngineTop", "generate"]


def padded(bits: int) -> int:
    """Whole bytes, as AXI4-Stream's TDATA wants them."""
    return -(-bits // 8) * 8


def stream_layouts(config: EngineConfig) -> dict[str, tuple[str, str]]:
    """Payload of each AXI4-Stream port: name, then whether the engine is its source."""
    layouts = {
        "s_axis_token": ("token", token_layout(config)),
        "s_axis_route": ("route", route_layout(config)),
        "m_axis_grant": ("grant", grant_layout(config)),
        "s_axis_release": ("release", release_layout(config)),
    }
    if config.buffer == "banks":
        layouts["m_axis_fill"] = ("fill", fill_layout(config))
    if config.event_port:
        layouts["m_axis_event"] = ("events", event_layout(config))
    return layouts


class EngineTop(wiring.Component):
    """:class:`stmoe.engine.Engine` behind flat ports.

    ``s_axil_*`` are the registers, ``m_axi_*`` the AXI4 read manager, ``s_axis_token_*``,
    ``s_axis_route_*``, ``m_axis_grant_*``, ``s_axis_release_*``, ``m_axis_fill_*`` and (with the
    event port) ``m_axis_event_*`` are AXI4-Stream. A stream's TDATA holds the payload's fields
    from bit 0 up, in the order of its layout in ``payloads.py``, padded with 0 to whole bytes.
    With ``config.buffer`` = axi there is no ``m_axis_fill_*`` but ``m_axi_buf_*``, an AXI4 write
    manager for the expert buffer; it belongs to ``clk`` also with ``memory_clock``.
    ``clk`` and the synchronous, active-high ``rst`` belong to all of them.

    With ``memory_clock`` the AXI read manager runs on a clock of its own, ``m_axi_aclk``, which may
    have any frequency and phase (:class:`stmoe.axi_cdc.AxiReadCrossing`). ``rst`` resets both
    sides, for as long as that takes on either clock: the engine answers nothing while
    ``m_axi_aclk`` stands still. ``m_axi_aresetn`` is low meanwhile: falls at once, rises in step
    with ``m_axi_aclk``. It resets whatever answers ``m_axi``. (Without ``memory_clock`` that is
    reset with ``rst``.)

    Parameters
    ----------
    config : :class:`EngineConfig`
    memory_clock : bool
        Whether ``m_axi`` has its own clock.
    """

    def __init__(self, config: EngineConfig, *, memory_clock: bool = False):
        self.config = config
        self.memory_clock = memory_clock
        clocks = {
            "clk": In(1),
            "rst": In(1),
            "m_axi_aclk": In(1),
            "m_axi_aresetn": Out(1),
        }
        members = {
            **(clocks if memory_clock else {}),
            **flat_axil_ports(addr_width(config)),
            **flat_axi4_read_ports(config),
            **(flat_axi4_write_ports(config) if config.buffer == "axi" else {}),
            "irq": Out(1),
        }
        for prefix, (_, layout) in stream_layouts(config).items():
            into, away = (In, Out) if prefix.startswith("s_") else (Out, In)
            members[f"{prefix}_tdata"] = into(padded(layout.size))
            members[f"{prefix}_tvalid"] = into(1)
            members[f"{prefix}_tready"] = away(1)
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        c = self.config
        m.submodules.engine = engine = Engine(c)
        connect_axil(m, self, engine.axil)
        axi = self._crossing(m, engine) if self.memory_clock else engine.axi
        connect_axi4_read(m, c, self, axi)
        if c.buffer == "axi":
            connect_axi4_write(m, c, self, engine.buffer)
        m.d.comb += self.irq.eq(engine.irq)
        for prefix, (name, layout) in stream_layouts(c).items():
            port = getattr(engine, name)
            tdata, tvalid, tready = (
                getattr(self, f"{prefix}_{signal}") for signal in ("tdata", "tvalid", "tready")
            )
            if prefix.startswith("s_"):
                m.d.comb += [
                    port.payload.eq(tdata[: layout.size]),
                    port.valid.eq(tvalid),
                    tready.eq(port.ready),
                ]
            else:
                m.d.comb += [
                    tdata.eq(Cat(port.payload)),
                    tvalid.eq(port.valid),
                    port.ready.eq(tready),
                ]
        return m

    def _crossing(self, m: Module, engine: Engine) -> wiring.PureInterface:
        """Both clock domains, their reset, and the engine's AXI on the clock of the memory."""
        m.domains.sync = ClockDomain()
        m.domains.memory = ClockDomain()
        m.submodules.crossing_reset = reset = CrossingReset()
        m.submodules.crossing = crossing = AxiReadCrossing(self.config)
        m.d.comb += [
            ClockSignal("sync").eq(self.clk),
            ClockSignal("memory").eq(self.m_axi_aclk),
            reset.reset.eq(self.rst),
            ResetSignal("sync").eq(reset.manager_reset),
            ResetSignal("memory").eq(reset.memory_reset),
            self.m_axi_aresetn.eq(~reset.memory_reset),
        ]
        wiring.connect(m, engine.axi, crossing.manager)
        return crossing.memory


def generate(
    config: EngineConfig, *, name: str = "stmoe_engine", memory_clock: bool = False
) -> str:
    """Verilog of the engine as module ``name``; the same arguments give the same text."""
    return "// SPDX-License-Identifier: Apache-2.0\n" + convert(
        EngineTop(config, memory_clock=memory_clock), name=name, emit_src=False
    )
