# SPDX-License-Identifier: Apache-2.0
"""The harness as the top of a simulation: flat names, and a trace memory that Python refills."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from stmoe.axil_flat import connect_axil, flat_axil_ports
from stmoe.harness.harness import Harness
from stmoe.harness.trace_player import word_layout
from stmoe.register_map import addr_width
from stmoe_golden.config import EngineConfig

__all__ = ["BANK_WORDS", "SimTop", "row_layout"]

BANK_WORDS = 1024
"""Words in each of the two banks of the trace memory. Writing a bank through cocotb takes about
3 ms, the time of a few hundred simulated cycles."""


def row_layout(config: EngineConfig) -> data.StructLayout:
    """One row of the trace memory; one that is not ``valid`` is skipped."""
    return data.StructLayout({"valid": 1, "word": word_layout(config)})


class SimTop(wiring.Component):
    """:class:`Harness` with the ports that ``tb/harness_sim.py`` uses.

    The trace memory is the Verilog array ``bank``: two banks of ``BANK_WORDS`` rows, which are
    played in turn. Python writes a bank and inverts its bit of ``filled``; when its last row has
    been read, its bit of ``consumed`` is inverted, so a bank is Python's when the two bits are
    equal.

    Parameters
    ----------
    config : :class:`EngineConfig`
    kwargs
        As for :class:`Harness`.

    Members
    -------
    s_axil_* : flat AXI4-Lite subordinate
    filled : :py:`In(2)`
    consumed : :py:`Out(2)`
    wake_cycles : :py:`In(32)`
        How often Python wants to be woken at least; 0 for never.
    wake : :py:`Out(1)`
        Inverted when a bank has been consumed, when ``done``, ``stuck`` or ``quiet`` has risen,
        and every ``wake_cycles``.
    others
        The inputs and outputs of :class:`Harness` with the same names.
    """

    def __init__(self, config: EngineConfig, **kwargs):
        self._config = config
        self._harness = Harness(config, **kwargs)
        self._passed = {
            name: member
            for name, member in self._harness.signature.members.items()
            if name not in ("i", "axil")
        }
        super().__init__(
            {
                **flat_axil_ports(addr_width(config)),
                **self._passed,
                "filled": In(2),
                "consumed": Out(2),
                "wake_cycles": In(32),
                "wake": Out(1),
            }
        )

    @property
    def public_names(self) -> list[str]:
        """Verilog names that cocotb needs: the ports, clock and reset, and the trace memory."""
        return ["clk", "rst", "bank", *self.signature.members]

    def elaborate(self, platform):
        m = Module()
        m.submodules.harness = harness = self._harness
        connect_axil(m, self, harness.axil)
        for name, member in self._passed.items():
            outer, inner = getattr(self, name), getattr(harness, name)
            if member.flow is In:
                m.d.comb += inner.eq(outer)
            else:
                m.d.comb += outer.eq(inner)

        m.submodules.bank = bank = Memory(
            shape=row_layout(self._config), depth=2 * BANK_WORDS, init=[]
        )
        read = bank.read_port()
        at = Signal(range(2 * BANK_WORDS))
        mine = Signal()
        """The bank of row ``at`` is filled."""
        there = Signal()
        """``read`` shows row ``at``."""
        over = Signal()
        m.d.comb += [
            read.addr.eq(at),
            mine.eq((self.filled ^ self.consumed).bit_select(at[-1], 1)),
            read.en.eq(mine & ~there),
            harness.i.payload.eq(read.data.word),
            harness.i.valid.eq(there & read.data.valid),
            over.eq(there & (~read.data.valid | harness.i.ready)),
        ]
        bank_over = Signal()
        m.d.comb += bank_over.eq(over & at[:-1].all())
        with m.If(over):
            m.d.sync += [there.eq(0), at.eq(at + 1)]
        with m.Elif(mine):
            m.d.sync += there.eq(1)
        with m.If(bank_over):
            m.d.sync += self.consumed.eq(self.consumed ^ (1 << at[-1]))

        levels = Cat(harness.done, harness.stuck, harness.quiet)
        last_levels = Signal.like(levels)
        ticks = Signal(32)
        tick = Signal()
        m.d.comb += tick.eq((self.wake_cycles != 0) & (ticks >= self.wake_cycles))
        m.d.sync += [last_levels.eq(levels), ticks.eq(ticks + 1)]
        with m.If(tick):
            m.d.sync += ticks.eq(1)
        with m.If(bank_over | (levels & ~last_levels).any() | tick):
            m.d.sync += self.wake.eq(~self.wake)
        return m
