# SPDX-License-Identifier: Apache-2.0
"""A board top with a board's pins, clock and reset around it."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import ClockDomain, ClockSignal, Const, Elaboratable, Module
from amaranth.lib import io, wiring
from amaranth.lib.cdc import ResetSynchronizer

from fpga.board import Board

__all__ = ["OnBoard"]


class OnBoard(Elaboratable):
    """The design as the tools see it: only pins are left.

    Domain ``sync`` is the PLL's output; its reset is let go two cycles after the PLL has locked
    and the reset button, where there is one, is up. ``rx`` of the UART is the pin that the
    device reads: amaranth-boards names pins from the device's side, so nothing crosses over.

    Parameters
    ----------
    board : :class:`Board`
    top : component with ``rx`` In(1), ``tx`` Out(1), ``leds`` Out(n)
        The board top, in domain ``sync``; it synchronises ``rx`` itself.
    clock_hz : int
        Of ``sync``; ``top`` must have been made for the same.
    """

    def __init__(self, board: Board, top: wiring.Component, *, clock_hz: int):
        self._board, self._top, self._clock_hz = board, top, clock_hz

    def elaborate(self, platform):
        m = Module()
        board, top = self._board, self._top

        def pin(name: str, port: Any, direction: str) -> io.Buffer:
            m.submodules[name] = buffer = io.Buffer(direction, port)
            return buffer

        clock = pin("clock", platform.request(platform.default_clk, dir="-"), "i")
        m.submodules.pll = pll = board.pll(self._clock_hz)
        m.domains.sync = ClockDomain()
        m.d.comb += [pll.i.eq(clock.i), ClockSignal().eq(pll.o)]
        pressed = Const(0)
        if board.reset is not None:
            pressed = pin("button", platform.request(board.reset, dir="-"), "i").i
        m.submodules.reset = ResetSynchronizer(~pll.locked | pressed, domain="sync")

        m.submodules.top = top
        uart = platform.request(board.uart, dir="-")
        rx, tx = pin("rx", uart.rx, "i"), pin("tx", uart.tx, "o")
        m.d.comb += [top.rx.eq(rx.i), tx.o.eq(top.tx)]
        for i, led in enumerate(top.leds):
            m.d.comb += pin(f"led{i}", platform.request("led", i, dir="-"), "o").o.eq(led)
        return m
