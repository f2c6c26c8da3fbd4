# SPDX-License-Identifier: Apache-2.0
"""The board's end of a line that may lose, spoil or repeat bytes: two streams that do not."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect

from stmoe.harness.board_protocol import (
    FRAME_CRC,
    FRAME_HEADER,
    FRAME_PAYLOAD,
    OFFSET_BITS,
    PROTOCOL_VERSION,
    REWIND,
    STATUS_BYTES,
    FrameKind,
)
from stmoe.harness.frame import FrameReceiver, FrameTransmitter

__all__ = ["BoardLink"]


def _ring_bits(name: str, size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an integer, not {size!r}")
    if size & (size - 1) or not 2 * FRAME_PAYLOAD <= size <= 1 << (OFFSET_BITS - 1):
        raise ValueError(
            f"{name} must be a power of two, {1 << (2 * FRAME_PAYLOAD - 1).bit_length()} to "
            f"{1 << (OFFSET_BITS - 1)}, not {size}"
        )
    return size.bit_length() - 1


class _RingReader(wiring.Component):
    """Reads a ring in order, a byte at a time.

    Members
    -------
    seek : :py:`In(1)`
        Forget the byte that was read; the next is that at ``at``.
    at : :py:`In(OFFSET_BITS)`, end : :py:`In(OFFSET_BITS)`
        Where the next byte lies, and where there is none yet.
    step : :py:`Out(1)`
        The byte at ``at`` is read: the next cycle's ``at`` is one more.
    address, enable : Out
        To the memory's read port; ``data`` from it.
    o : :py:`Out(stream.Signature(8))`
    """

    def __init__(self, bits: int):
        super().__init__(
            {
                "seek": In(1),
                "at": In(OFFSET_BITS),
                "end": In(OFFSET_BITS),
                "step": Out(1),
                "address": Out(bits),
                "enable": Out(1),
                "data": In(8),
                "o": Out(stream.Signature(8)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        read = Signal()
        """The memory shows the byte."""
        m.d.comb += [
            self.address.eq(self.at),
            self.step.eq(~read & ~self.o.valid & (self.at != self.end) & ~self.seek),
            self.enable.eq(self.step),
        ]
        # Kept in a register: what comes out of a memory comes late in its cycle.
        m.d.sync += read.eq(self.step)
        with m.If(self.seek | self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(read & ~self.seek):
            m.d.sync += [self.o.valid.eq(1), self.o.payload.eq(self.data)]
        return m


class BoardLink(wiring.Component):
    """Two reliable streams of bytes over frames on an unreliable line (docs/board.md).

    Every frame carries a session, the offset of its bytes in the sender's stream, and how far the
    sender has received the other's. The board takes the bytes of a frame only when its CRC is
    right, the session is the one that is open, the offset is the one that it expects, and the ring
    has room for all of them; so a frame that comes twice has no effect. What the board has sent
    stays in its ring until the host acknowledges it, and is sent again when the host asks. It has
    no timers: the host has. It answers every frame, also a spoiled one, with its status.

    A session begins with ``restart``: both streams are empty and at offset 0.

    Parameters
    ----------
    config_hash : int
        Of the engine's configuration.
    receive_bytes, transmit_bytes : int
        Size of the two rings, powers of two, 512 to 32768.

    Members
    -------
    data, valid, error : In
        From the UART's receiver.
    line : :py:`Out(stream.Signature(8))`
        To the UART's transmitter.
    received : :py:`Out(stream.Signature(8))`
        The host's stream.
    sent : :py:`In(stream.Signature(8))`
        The board's stream.
    flags : :py:`In(8)`
        ``Status.flags``.
    tokens : :py:`In(32)`
        ``Status.tokens``.
    restart : :py:`Out(1)`
        One cycle: a session begins. ``received`` and ``sent`` are to be reset with it.
    opened : :py:`Out(1)`
        A session is open.
    """

    class State(enum.Enum, shape=2):
        IDLE = 0
        HEADER = 1
        STATUS = 2
        DATA = 3

    def __init__(self, config_hash: int, *, receive_bytes: int = 2048, transmit_bytes: int = 4096):
        self._hash = config_hash
        self._receive_bits = _ring_bits("receive_bytes", receive_bytes)
        self._transmit_bits = _ring_bits("transmit_bytes", transmit_bytes)
        super().__init__(
            {
                "data": In(8),
                "valid": In(1),
                "error": In(1),
                "line": Out(stream.Signature(8)),
                "received": Out(stream.Signature(8)),
                "sent": In(stream.Signature(8)),
                "flags": In(8),
                "tokens": In(32),
                "restart": Out(1),
                "opened": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.receiver = receiver = FrameReceiver()
        m.submodules.transmitter = transmitter = FrameTransmitter()
        m.d.comb += [
            receiver.data.eq(self.data),
            receiver.valid.eq(self.valid),
            receiver.error.eq(self.error),
        ]
        connect(m, transmitter.o, wiring.flipped(self.line))

        def offset(name: str) -> Signal:
            return Signal(OFFSET_BITS, name=name)

        session = Signal(8)
        status_due = Signal(init=1)
        """A status is to be sent; also after power-up, to say that the board is there."""
        rewind_due, open_due = Signal(), Signal()
        new_session = Signal(8)
        bad_frames = Signal(8 * STATUS_BYTES.bad)

        # Receiving: bytes go into the ring as they come, and count once the frame has ended well.
        m.submodules.receive_ring = ring = Memory(shape=8, depth=1 << self._receive_bits, init=[])
        write, read = ring.write_port(), ring.read_port()
        expected, consumed = offset("expected"), offset("consumed")
        tentative = offset("tentative")
        header = Signal(
            data.StructLayout(
                {"kind": 8, "session": 8, "offset": OFFSET_BITS, "acknowledge": OFFSET_BITS}
            )
        )
        got = Signal(range(FRAME_HEADER + 1))
        """Bytes of the header that have come."""
        length = Signal(range(FRAME_CRC + 1))
        """Bytes after the header, saturating."""
        overrun = Signal()
        in_header = Signal()
        room = Signal()
        used = Signal(OFFSET_BITS)
        m.d.comb += [
            in_header.eq(got != FRAME_HEADER),
            used.eq(tentative - consumed),
            room.eq(~used[self._receive_bits]),
            write.addr.eq(tentative),
            write.data.eq(receiver.payload),
            write.en.eq(receiver.take & ~in_header & room),
        ]
        with m.If(receiver.start):
            m.d.sync += [got.eq(0), length.eq(0), overrun.eq(0)]
        with m.Elif(receiver.take & in_header):
            m.d.sync += [
                got.eq(got + 1),
                tentative.eq(expected),
                # Least significant byte first: the header is shifted in from the top.
                header.eq(Cat(header.as_value()[8:], receiver.payload)),
            ]
        with m.Elif(receiver.take):
            m.d.sync += [tentative.eq(tentative + room), overrun.eq(overrun | ~room)]
            with m.If(length != FRAME_CRC):
                m.d.sync += length.eq(length + 1)

        # Sending: the ring holds what the host has not acknowledged.
        m.submodules.transmit_ring = sending = Memory(
            shape=8, depth=1 << self._transmit_bits, init=[]
        )
        fill, drain = sending.write_port(), sending.read_port()
        head, next_sent, acknowledged = offset("head"), offset("next_sent"), offset("acknowledged")
        unacknowledged = Signal(OFFSET_BITS)
        m.d.comb += [
            unacknowledged.eq(head - acknowledged),
            self.sent.ready.eq(~unacknowledged[self._transmit_bits]),
            fill.addr.eq(head),
            fill.data.eq(self.sent.payload),
            fill.en.eq(self.sent.valid & self.sent.ready),
        ]
        with m.If(fill.en):
            m.d.sync += head.eq(head + 1)

        # What a frame that has ended well says. `receiver.start` comes in the same cycle, so what
        # it resets is still there.
        kind = header.kind[:7]
        newly = Signal(OFFSET_BITS)
        m.d.comb += newly.eq(header.acknowledge - acknowledged)
        with m.If(receiver.good & (length == FRAME_CRC)):
            m.d.sync += status_due.eq(1)
            with m.If((kind == FrameKind.DATA) & self.opened & (header.session == session)):
                with m.If((header.offset == expected) & ~overrun):
                    m.d.sync += expected.eq(tentative - FRAME_CRC)
                with m.If(newly <= unacknowledged):
                    m.d.sync += acknowledged.eq(header.acknowledge)
                    m.d.sync += rewind_due.eq(rewind_due | header.kind[REWIND.bit_length() - 1])
            with m.If((kind == FrameKind.OPEN) & ~(self.opened & (header.session == session))):
                m.d.sync += [open_due.eq(1), new_session.eq(header.session)]
        with m.Elif(receiver.bad | receiver.good):
            m.d.sync += [status_due.eq(1), bad_frames.eq(bad_frames + 1)]

        # The reader of either ring.
        m.submodules.consumer = consumer = _RingReader(self._receive_bits)
        m.d.comb += [
            consumer.at.eq(consumed),
            consumer.end.eq(expected),
            consumer.seek.eq(self.restart),
            read.addr.eq(consumer.address),
            read.en.eq(consumer.enable),
            consumer.data.eq(read.data),
        ]
        m.d.sync += consumed.eq(consumed + consumer.step)
        connect(m, consumer.o, wiring.flipped(self.received))

        state = Signal(self.State)
        left = Signal(range(max(FRAME_PAYLOAD, sum(STATUS_BYTES)) + 1))
        """Bytes of this part of the frame that are still to come, this one included."""
        frame_kind = Signal(FrameKind)
        frame_offset, frame_acknowledge = offset("frame_offset"), offset("frame_acknowledge")
        # What could change between two bytes of it is sampled when the frame begins.
        frame_tokens = Signal(32)
        frame_consumed = Signal(OFFSET_BITS)
        waiting = Signal(OFFSET_BITS)
        m.submodules.supplier = supplier = _RingReader(self._transmit_bits)
        m.d.comb += [
            waiting.eq(head - next_sent),
            supplier.at.eq(next_sent),
            supplier.end.eq(head),
            supplier.seek.eq(state != self.State.DATA),
            drain.addr.eq(supplier.address),
            drain.en.eq(supplier.enable),
            supplier.data.eq(drain.data),
        ]
        m.d.sync += next_sent.eq(next_sent + supplier.step)

        status = STATUS_BYTES._replace(
            version=Const(PROTOCOL_VERSION, 8),
            rings=Const(self._receive_bits | self._transmit_bits << 4, 8),
            config=Const(self._hash, 32),
            flags=self.flags,
            consumed=frame_consumed,
            tokens=frame_tokens,
            bad=bad_frames,
        )
        text = Cat(
            Value.cast(value)[: 8 * n] for value, n in zip(status, STATUS_BYTES, strict=True)
        )
        opening = Cat(Cat(frame_kind, Const(0, 8))[:8], session, frame_offset, frame_acknowledge)
        # `left` counts down, so the first byte is the last word of a table that is turned round.
        header_bytes = [opening.word_select(i, 8) for i in range(FRAME_HEADER)]
        status_bytes = [text.word_select(i, 8) for i in range(sum(STATUS_BYTES))]
        out = transmitter.i

        def pick(table: list[Value]):
            with m.Switch(left):
                for i, byte in enumerate(table):
                    with m.Case(len(table) - i):
                        m.d.comb += out.payload.eq(byte)

        taken = out.valid & out.ready
        with m.If(taken):
            m.d.sync += left.eq(left - 1)
        with m.Switch(state):
            with m.Case(self.State.IDLE):
                m.d.sync += [
                    left.eq(FRAME_HEADER),
                    frame_acknowledge.eq(expected),
                    frame_tokens.eq(self.tokens),
                    frame_consumed.eq(consumed),
                ]
                with m.If(open_due):
                    m.d.comb += self.restart.eq(1)
                with m.Elif((rewind_due | (waiting > unacknowledged)) & ~receiver.good):
                    # Asked to, or what was to be sent again has been acknowledged meanwhile.
                    m.d.sync += [rewind_due.eq(0), next_sent.eq(acknowledged)]
                with m.Elif(status_due):
                    m.d.sync += [
                        status_due.eq(receiver.good | receiver.bad),
                        frame_kind.eq(FrameKind.STATUS),
                        frame_offset.eq(head),
                        state.eq(self.State.HEADER),
                    ]
                with m.Elif(waiting != 0):
                    m.d.sync += [
                        frame_kind.eq(FrameKind.DATA),
                        frame_offset.eq(next_sent),
                        state.eq(self.State.HEADER),
                    ]
            with m.Case(self.State.HEADER):
                m.d.comb += out.valid.eq(1)
                pick(header_bytes)
                with m.If(taken & (left == 1)):
                    with m.If(frame_kind == FrameKind.STATUS):
                        m.d.sync += [left.eq(len(status_bytes)), state.eq(self.State.STATUS)]
                    with m.Else():
                        m.d.sync += [
                            left.eq(Mux(waiting > FRAME_PAYLOAD, FRAME_PAYLOAD, waiting)),
                            state.eq(self.State.DATA),
                        ]
            with m.Case(self.State.STATUS):
                m.d.comb += [out.valid.eq(1), transmitter.last.eq(left == 1)]
                pick(status_bytes)
                with m.If(taken & (left == 1)):
                    m.d.sync += state.eq(self.State.IDLE)
            with m.Case(self.State.DATA):
                m.d.comb += [
                    out.payload.eq(supplier.o.payload),
                    out.valid.eq(supplier.o.valid),
                    supplier.o.ready.eq(out.ready),
                    transmitter.last.eq(left == 1),
                ]
                with m.If(taken & (left == 1)):
                    m.d.sync += state.eq(self.State.IDLE)

        with m.If(self.restart):
            m.d.sync += [
                open_due.eq(0),
                rewind_due.eq(0),
                status_due.eq(1),
                self.opened.eq(1),
                session.eq(new_session),
                *(
                    pointer.eq(0)
                    for pointer in (
                        expected,
                        consumed,
                        tentative,
                        head,
                        next_sent,
                        acknowledged,
                    )
                ),
            ]
        return m
