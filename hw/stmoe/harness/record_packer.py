# SPDX-License-Identifier: Apache-2.0
"""Packs records of the event port into few bytes."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import enum, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe.harness.board_protocol import (
    CYCLE_BYTES,
    STAMP_RECORDS,
    Delta,
    Message,
    Piece,
    piece_bytes,
    record_pieces,
)
from stmoe.payloads import CYCLE_BITS, event_layout
from stmoe_golden.config import EngineConfig
from stmoe_golden.records import Kind

__all__ = ["RecordPacker", "record_widths"]


def record_widths(config: EngineConfig) -> dict[str, int]:
    """Width of each field of a record."""
    return {name: field.width for name, field in event_layout(config)}


class RecordPacker(wiring.Component):
    """Turns each record into a message (docs/board.md): its kind and how its cycle follows in one
    byte, the cycle in 0, 1, 2 or 5, then the pieces that its kind uses; all fields where a piece
    that the kind should not use is set, so that nothing an engine says is ever dropped. Every
    :data:`STAMP_RECORDS` records a stamp tells the present cycle.

    Parameters
    ----------
    config : :class:`EngineConfig`
    address_bits : int
        Bits of the addresses that experts lie at.

    Members
    -------
    i : :py:`In(stream.Signature(event_layout(config)))`
        One is taken in at most every fifth cycle.
    cycle : :py:`In(40)`
    o : :py:`Out(stream.Signature(8))`
    last : :py:`Out(1)`
        With the last byte of a message.
    records : :py:`Out(32)`
        Records taken.
    """

    class State(enum.Enum, shape=3):
        WAIT = 0
        """For a record."""
        CHOOSE = 1
        """How it is packed."""
        PACK = 2
        HEAD = 3
        CYCLE = 4
        PIECES = 5

    def __init__(self, config: EngineConfig, *, address_bits: int):
        self._config = config
        self._address_bits = address_bits
        super().__init__(
            {
                "i": In(stream.Signature(event_layout(config))),
                "cycle": In(CYCLE_BITS),
                "o": Out(stream.Signature(8)),
                "last": Out(1),
                "records": Out(32),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        widths = record_widths(config)
        by_kind, raw = record_pieces(config, self._address_bits, widths)
        state = Signal(self.State)
        record = Signal(event_layout(config))
        since_stamp = Signal(range(STAMP_RECORDS + 1))
        stamp = Signal()
        """The message is a stamp, whose cycle is in ``cycle_bytes``."""
        base = Signal(CYCLE_BITS)
        """Cycle of the latest record."""

        def covers(pieces: tuple[Piece, ...]) -> Value:
            """No bit of the record is set that is in none of the pieces."""
            bits = {name: set(range(widths[name])) for name in (piece.field for piece in raw)}
            for piece in pieces:
                bits[piece.field] -= set(range(piece.lsb, piece.lsb + piece.width))
            rest = [Value.cast(record[name])[bit] for name in bits for bit in sorted(bits[name])]
            return ~Cat(*rest).any()

        # One bit for each way to pack a record, the last for all of its fields.
        formats: dict[tuple[Piece, ...], list[Kind]] = {}
        for kind, pieces in by_kind.items():
            formats.setdefault(pieces, []).append(kind)
        ways = [*formats, raw]
        way = Signal(len(ways))
        choice = Signal(len(ways))
        m.d.comb += choice.eq(1 << len(formats))
        with m.Switch(Value.cast(record.kind)):
            for i, (pieces, kinds) in enumerate(formats.items()):
                with m.Case(*(int(kind) for kind in kinds)):
                    with m.If(covers(pieces)):
                        m.d.comb += choice.eq(1 << i)

        # Most ways have most of their bits in the same place, so this is gates rather than a
        # multiplexer of whole records.
        body_bytes = piece_bytes(raw)
        sources: list[dict[tuple[str, int], list[int]]] = [{} for _ in range(8 * body_bytes)]
        for i, pieces in enumerate(ways):
            bits = [
                (piece.field, piece.lsb + bit) for piece in pieces for bit in range(piece.width)
            ]
            for place, bit in enumerate(bits):
                sources[place].setdefault(bit, []).append(i)
        chosen = {
            tuple(users): Cat(way[i] for i in users).any()
            for source in sources
            for users in source.values()
        }
        body = Cat(
            Cat(
                Value.cast(record[name])[bit] & chosen[tuple(users)]
                for (name, bit), users in source.items()
            ).any()
            for source in sources
        )
        count = Signal(range(body_bytes + 1))
        for i, pieces in enumerate(ways):
            with m.If(way[i]):
                m.d.comb += count.eq(piece_bytes(pieces))

        cycle_bytes = Signal(8 * CYCLE_BYTES)
        """The cycles since the record before, then what is sent of them."""
        cycle_left = Signal(range(CYCLE_BYTES + 1))
        delta = Signal(Delta)
        with m.If(stamp | cycle_bytes[16:].any()):
            m.d.comb += delta.eq(Delta.ABSOLUTE)
        with m.Elif(cycle_bytes[8:16].any()):
            m.d.comb += delta.eq(Delta.WORD)
        with m.Elif(cycle_bytes[:8].any()):
            m.d.comb += delta.eq(Delta.BYTE)
        with m.Else():
            m.d.comb += delta.eq(Delta.SAME)

        packed = Signal(8 * body_bytes)
        packed_left = Signal.like(count)
        head = Signal(8)
        with m.Switch(state):
            with m.Case(self.State.WAIT):
                m.d.sync += stamp.eq(since_stamp == STAMP_RECORDS)
                with m.If(since_stamp == STAMP_RECORDS):
                    m.d.sync += [
                        cycle_bytes.eq(self.cycle),
                        since_stamp.eq(0),
                        state.eq(self.State.CHOOSE),
                    ]
                with m.Else():
                    m.d.comb += self.i.ready.eq(1)
                    with m.If(self.i.valid):
                        m.d.sync += [
                            record.eq(self.i.payload),
                            cycle_bytes.eq(self.i.payload.cycle - base),
                            base.eq(self.i.payload.cycle),
                            since_stamp.eq(since_stamp + 1),
                            self.records.eq(self.records + 1),
                            state.eq(self.State.CHOOSE),
                        ]
            with m.Case(self.State.CHOOSE):
                m.d.sync += [way.eq(choice), state.eq(self.State.PACK)]
            with m.Case(self.State.PACK):
                first = Mux(stamp, int(Message.STAMP), Value.cast(record.kind))
                m.d.sync += [
                    head.eq(Cat(first[:5], delta, way[-1] & ~stamp)),
                    packed.eq(body),
                    packed_left.eq(Mux(stamp, 0, count)),
                    state.eq(self.State.HEAD),
                ]
                with m.Switch(delta):
                    for kind, n in ((Delta.SAME, 0), (Delta.BYTE, 1), (Delta.WORD, 2)):
                        with m.Case(kind):
                            m.d.sync += cycle_left.eq(n)
                    with m.Default():
                        m.d.sync += cycle_left.eq(CYCLE_BYTES)
                        with m.If(~stamp):
                            m.d.sync += cycle_bytes.eq(base)
            with m.Case(self.State.HEAD):
                m.d.comb += [
                    self.o.valid.eq(1),
                    self.o.payload.eq(head),
                    self.last.eq((cycle_left == 0) & (packed_left == 0)),
                ]
                with m.If(self.o.ready):
                    with m.If(cycle_left != 0):
                        m.d.sync += state.eq(self.State.CYCLE)
                    with m.Elif(packed_left != 0):
                        m.d.sync += state.eq(self.State.PIECES)
                    with m.Else():
                        m.d.sync += state.eq(self.State.WAIT)
            with m.Case(self.State.CYCLE):
                m.d.comb += [
                    self.o.valid.eq(1),
                    self.o.payload.eq(cycle_bytes[:8]),
                    self.last.eq((cycle_left == 1) & (packed_left == 0)),
                ]
                with m.If(self.o.ready):
                    m.d.sync += [
                        cycle_bytes.eq(Cat(cycle_bytes[8:], Const(0, 8))),
                        cycle_left.eq(cycle_left - 1),
                    ]
                    with m.If(self.last):
                        m.d.sync += state.eq(self.State.WAIT)
                    with m.Elif(cycle_left == 1):
                        m.d.sync += state.eq(self.State.PIECES)
            with m.Case(self.State.PIECES):
                m.d.comb += [
                    self.o.valid.eq(1),
                    self.o.payload.eq(packed[:8]),
                    self.last.eq(packed_left == 1),
                ]
                with m.If(self.o.ready):
                    m.d.sync += [
                        packed.eq(Cat(packed[8:], Const(0, 8))),
                        packed_left.eq(packed_left - 1),
                    ]
                    with m.If(self.last):
                        m.d.sync += state.eq(self.State.WAIT)
        return m
