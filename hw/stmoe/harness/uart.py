# SPDX-License-Identifier: Apache-2.0
"""A UART, 8N1: one receiver, one transmitter, for any ratio of clock and speed from 4 on."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import cdc, enum, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["UartReceiver", "UartTransmitter"]

FRACTION_BITS = 8
"""Of a bit's length in clocks: over a byte the last edge is off by less than a clock."""

MIN_CLOCKS, MAX_CLOCKS = 4, 1 << 16


def _bit_length(clock_hz: int, baud: int) -> int:
    """Length of a bit in clocks, with :data:`FRACTION_BITS` fraction bits."""
    for name, value in (("clock_hz", clock_hz), ("baud", baud)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, not {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    if not MIN_CLOCKS * baud <= clock_hz <= MAX_CLOCKS * baud:
        raise ValueError(
            f"baud must be {-(-clock_hz // MAX_CLOCKS)} to {clock_hz // MIN_CLOCKS} with a clock "
            f"of {clock_hz} Hz, not {baud}"
        )
    return round((clock_hz << FRACTION_BITS) / baud)


class _BitTimer(wiring.Component):
    """Divides the clock into bits.

    Members
    -------
    restart, half : :py:`In(1)`
        A bit begins with the next cycle; with ``half`` it is half as long.
    over : :py:`Out(1)`
        The last cycle of a bit; the next one begins with the next cycle.
    """

    def __init__(self, clock_hz: int, baud: int):
        self._length = _bit_length(clock_hz, baud)
        super().__init__({"restart": In(1), "half": In(1), "over": Out(1)})

    def elaborate(self, platform):
        m = Module()
        whole, fraction = divmod(self._length, 1 << FRACTION_BITS)
        left = Signal(range(whole + 1))
        late = Signal(FRACTION_BITS)
        """What earlier bits were cut short by."""
        after = Signal(FRACTION_BITS + 1)
        m.d.comb += [self.over.eq(left == 0), after.eq(late + fraction)]
        with m.If(self.restart):
            m.d.sync += [left.eq(Mux(self.half, whole // 2, whole) - 1), late.eq(0)]
        with m.Elif(self.over):
            m.d.sync += [left.eq(whole - 1 + after[FRACTION_BITS]), late.eq(after)]
        with m.Else():
            m.d.sync += left.eq(left - 1)
        return m


class UartReceiver(wiring.Component):
    """Takes bytes from a line, least significant bit first, one stop bit.

    A bit is sampled in its middle, counted from the start bit's edge. A start bit that is over by
    its middle is noise and ignored. It listens for the next start bit from the middle of the stop
    bit on, so a sender may be faster than it by up to half a bit in ten.

    Parameters
    ----------
    clock_hz, baud : int
        4 to 65536 clocks to a bit.

    Members
    -------
    rx : :py:`In(1, init=1)`
        The line; synchronised here.
    data : :py:`Out(8)`
        A byte, with ``valid``.
    valid : :py:`Out(1)`
        One cycle: a byte has come.
    error : :py:`Out(1)`
        One cycle: there was no stop bit. Nothing more comes until the line is high again.
    """

    def __init__(self, *, clock_hz: int, baud: int):
        self._timer = _BitTimer(clock_hz, baud)
        super().__init__({"rx": In(1, init=1), "data": Out(8), "valid": Out(1), "error": Out(1)})

    class State(enum.Enum, shape=2):
        IDLE = 0
        START = 1
        BITS = 2
        BREAK = 3

    def elaborate(self, platform):
        m = Module()
        m.submodules.timer = timer = self._timer
        rx = Signal(init=1)
        m.submodules.synchroniser = cdc.FFSynchronizer(self.rx, rx, init=1)
        state = Signal(self.State)
        count = Signal(range(9))
        m.d.sync += [self.valid.eq(0), self.error.eq(0)]
        with m.Switch(state):
            with m.Case(self.State.IDLE):
                m.d.comb += [timer.restart.eq(1), timer.half.eq(1)]
                m.d.sync += count.eq(0)
                with m.If(~rx):
                    m.d.sync += state.eq(self.State.START)
            with m.Case(self.State.START):
                with m.If(timer.over):
                    m.d.comb += timer.restart.eq(1)
                    m.d.sync += state.eq(Mux(rx, self.State.IDLE, self.State.BITS))
            with m.Case(self.State.BITS):
                with m.If(timer.over):
                    m.d.sync += count.eq(count + 1)
                    with m.If(count != 8):
                        m.d.sync += self.data.eq(Cat(self.data[1:], rx))
                    with m.Else():
                        m.d.sync += [
                            self.valid.eq(rx),
                            self.error.eq(~rx),
                            state.eq(Mux(rx, self.State.IDLE, self.State.BREAK)),
                        ]
            with m.Case(self.State.BREAK):
                with m.If(rx):
                    m.d.sync += state.eq(self.State.IDLE)
        return m


class UartTransmitter(wiring.Component):
    """Sends bytes, least significant bit first, one stop bit, without a gap between them.

    Parameters
    ----------
    clock_hz, baud : int
        4 to 65536 clocks to a bit.

    Members
    -------
    i : :py:`In(stream.Signature(8))`
        Taken when its start bit begins.
    tx : :py:`Out(1, init=1)`
        The line, from a register; high when idle.
    """

    def __init__(self, *, clock_hz: int, baud: int):
        self._timer = _BitTimer(clock_hz, baud)
        super().__init__({"i": In(stream.Signature(8)), "tx": Out(1, init=1)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.timer = timer = self._timer
        rest = Signal(9)
        """Bits to come after the one on the line, the stop bit last; ones fill it up."""
        left = Signal(range(10))
        """Bits to come, the stop bit included."""
        busy = Signal()
        """A bit is on the line."""
        m.d.comb += [
            self.i.ready.eq(~busy | (timer.over & (left == 0))),
            timer.restart.eq(self.i.ready),
        ]
        with m.If(self.i.ready):
            m.d.sync += [
                busy.eq(self.i.valid),
                self.tx.eq(~self.i.valid),
                rest.eq(Cat(self.i.payload, 1)),
                left.eq(9),
            ]
        with m.Elif(timer.over):
            m.d.sync += [self.tx.eq(rest[0]), rest.eq(Cat(rest[1:], 1)), left.eq(left - 1)]
        return m
