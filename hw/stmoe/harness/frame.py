# SPDX-License-Identifier: Apache-2.0
"""Frames on a line of bytes: flags, escapes and CRC-32, as PPP has them (RFC 1662)."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import enum, stream, wiring
from amaranth.lib.crc.catalog import CRC32_ISO_HDLC
from amaranth.lib.wiring import In, Out

from stmoe.harness.board_protocol import ESCAPE, ESCAPE_XOR, FLAG, FRAME_CRC

__all__ = ["FrameReceiver", "FrameTransmitter"]


class _SerialCrc(wiring.Component):
    """CRC-32 of bytes, a bit in a cycle: bytes on a UART are 40 or more cycles apart, and eight
    bits at once would take several times the gates.

    Members
    -------
    start : :py:`In(1)`
        A frame begins; not with ``take``.
    data, take : In
        A byte; nothing else may come in the 9 cycles after it.
    busy : :py:`Out(1)`
    crc : :py:`Out(32)`
    match : :py:`Out(1)`
        The last four bytes were the CRC of those before.
    """

    def __init__(self):
        super().__init__(
            {
                "start": In(1),
                "data": In(8),
                "take": In(1),
                "busy": Out(1),
                "crc": Out(32),
                "match": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.core = core = CRC32_ISO_HDLC(data_width=1).create()
        bits = Signal(8)
        left = Signal(range(9))
        m.d.comb += [
            self.busy.eq(left != 0),
            core.start.eq(self.start),
            core.valid.eq(self.busy),
            core.data.eq(bits[0]),
            self.crc.eq(core.crc),
            self.match.eq(core.match_detected),
        ]
        with m.If(self.take):
            m.d.sync += [bits.eq(self.data), left.eq(8)]
        with m.Elif(self.busy):
            m.d.sync += [bits.eq(bits[1:]), left.eq(left - 1)]
        return m


class FrameReceiver(wiring.Component):
    """Finds frames in what a UART receives, and says whether they came whole.

    Whatever stands between two flags is a frame, so that after any error the next flag puts it
    right. Nothing at all between two flags is no frame.

    Members
    -------
    data, valid, error
        From :class:`stmoe.harness.uart.UartReceiver`; 12 or more cycles apart.
    start : :py:`Out(1)`
        A flag: what comes next begins a frame.
    payload : :py:`Out(8)`
        A byte of a frame, its CRC's four included, with ``take``.
    take : :py:`Out(1)`
    good, bad : :py:`Out(1)`
        One cycle, never with ``take``: a frame has ended whose CRC is right, or one that is to be
        forgotten (wrong CRC, ended within an escape, or a broken byte in it).
    """

    def __init__(self):
        super().__init__(
            {
                "data": In(8),
                "valid": In(1),
                "error": In(1),
                "start": Out(1),
                "payload": Out(8),
                "take": Out(1),
                "good": Out(1),
                "bad": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.fcs = crc = _SerialCrc()
        escaped, broken, empty = Signal(), Signal(), Signal(init=1)
        flag = self.data == FLAG
        m.d.comb += [
            crc.data.eq(self.payload),
            crc.take.eq(self.take),
            crc.start.eq(self.start),
        ]
        m.d.sync += [self.start.eq(0), self.take.eq(0), self.good.eq(0), self.bad.eq(0)]
        with m.If(self.error):
            m.d.sync += [broken.eq(1), empty.eq(0)]
        with m.Elif(self.valid & flag):
            m.d.sync += [escaped.eq(0), broken.eq(0), empty.eq(1), self.start.eq(1)]
            with m.If(~empty):
                with m.If(crc.match & ~escaped & ~broken):
                    m.d.sync += self.good.eq(1)
                with m.Else():
                    m.d.sync += self.bad.eq(1)
        with m.Elif(self.valid):
            m.d.sync += empty.eq(0)
            with m.If((self.data == ESCAPE) & ~escaped):
                m.d.sync += escaped.eq(1)
            with m.Else():
                m.d.sync += [
                    escaped.eq(0),
                    self.payload.eq(self.data ^ Mux(escaped, ESCAPE_XOR, 0)),
                    self.take.eq(1),
                ]
        return m


class FrameTransmitter(wiring.Component):
    """Puts frames on a line of bytes.

    Members
    -------
    i : :py:`In(stream.Signature(8))`
        The bytes of a frame; must be there without long gaps.
    last : :py:`In(1)`
        With the last byte of a frame.
    o : :py:`Out(stream.Signature(8))`
    """

    class State(enum.Enum, shape=3):
        OPEN = 0
        FETCH = 1
        """The next byte, or the next of the CRC."""
        BODY = 2
        ESCAPED = 3
        CLOSE = 4

    def __init__(self):
        super().__init__(
            {"i": In(stream.Signature(8)), "last": In(1), "o": Out(stream.Signature(8))}
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.fcs = crc = _SerialCrc()
        state = Signal(self.State)
        body = Signal(8)
        """The byte to send, before it is escaped."""
        ended = Signal()
        """Only the CRC is still to come."""
        sent = Signal(range(FRAME_CRC + 1))
        """Bytes of it that have been fetched."""
        special = Signal()
        m.d.comb += [
            crc.data.eq(self.i.payload),
            crc.take.eq(self.i.valid & self.i.ready),
            special.eq((body == FLAG) | (body == ESCAPE)),
        ]

        def put(byte, next_state):
            m.d.comb += self.o.payload.eq(byte)
            with m.If(self.o.valid & self.o.ready):
                m.d.sync += state.eq(next_state)

        with m.Switch(state):
            with m.Case(self.State.OPEN):
                m.d.comb += [self.o.valid.eq(self.i.valid), crc.start.eq(1)]
                m.d.sync += [ended.eq(0), sent.eq(0)]
                put(FLAG, self.State.FETCH)
            with m.Case(self.State.FETCH):
                with m.If(~ended):
                    m.d.comb += self.i.ready.eq(~crc.busy)
                    m.d.sync += body.eq(self.i.payload)
                    with m.If(self.i.valid & ~crc.busy):
                        m.d.sync += [ended.eq(self.last), state.eq(self.State.BODY)]
                with m.Elif(~crc.busy):
                    m.d.sync += [body.eq(crc.crc.word_select(sent[:2], 8)), sent.eq(sent + 1)]
                    m.d.sync += state.eq(Mux(sent == FRAME_CRC, self.State.CLOSE, self.State.BODY))
            with m.Case(self.State.BODY):
                m.d.comb += self.o.valid.eq(1)
                put(
                    Mux(special, ESCAPE, body),
                    Mux(special, self.State.ESCAPED, self.State.FETCH),
                )
            with m.Case(self.State.ESCAPED):
                m.d.comb += self.o.valid.eq(1)
                put(body ^ ESCAPE_XOR, self.State.FETCH)
            with m.Case(self.State.CLOSE):
                m.d.comb += self.o.valid.eq(1)
                put(FLAG, self.State.OPEN)
        return m
