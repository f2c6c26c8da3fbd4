# SPDX-License-Identifier: Apache-2.0
"""Puts what is loaded into a buffer behind an AXI4 write manager, and knows when it is there."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal, Value, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import PAGE_BYTES, EngineConfig

from .head_queue import HeadQueue
from .payloads import (
    ERROR_RESPONSE_BIT,
    axi4_write_signature,
    buffer_place_layout,
    fill_layout,
)

__all__ = ["BufferWriter"]

LEAST_DATA_DEPTH = 16
"""Beats that the data queue holds at least, so that short bursts follow each other without a gap
from the first beat to the W channel."""


class BufferWriter(wiring.Component):
    """Gathers the beats of ``fill`` into AXI write bursts, and counts what is not answered yet.

    Beats of one transfer come in order, those of different transfers mixed in any way (read data
    may be interleaved by ID). A *burst* is a run of beats of one transfer, one behind the other
    in its slot. It is closed after the last beat of a read burst, at a 4 KiB boundary of the
    buffer, after ``max_burst`` beats, when a beat comes that does not continue it, when a beat of
    its transfer was discarded, and with ``abort``. So a read burst whose beats come together is
    one write burst, or two where its addresses in the buffer cross 4 KiB; interleaved by beats,
    each beat is a burst of its own. An address is sent only when all data of its burst is here:
    the W channel never waits for a read.

    Slots begin on 4 KiB boundaries, so the offset in the slot alone tells where pages end.

    **Order.** Addresses go out in the order in which bursts were begun, data in the order of the
    addresses. The AXI ID is the transfer; answers of different IDs may come in any order. At most
    ``max_outstanding`` bursts are between the choice of their address and their answer.

    **Throughput.** One beat a cycle while AW and W are taken at once and answers come in time.
    From a burst's last beat on ``fill`` to its address: 5 cycles when nothing is before it.

    Parameters
    ----------
    config : :class:`EngineConfig`
        Uses the AXI sizes, ``max_burst``, ``max_outstanding``, ``transfers`` and the slot's size.

    Members
    -------
    fill : :py:`In(stream.Signature(fill_layout(config)))`
        ``fill.ready`` depends on registers alone.
    fill_transfer, fill_last : :py:`In`
        Transfer of the beat on ``fill``; whether it is the last of its read burst.
    drop : :py:`In(1)`
        This cycle a beat of ``fill_transfer`` was discarded. No beat of that transfer comes any
        more before its completion.
    abort : :py:`In(1)`
        One cycle: the watchdog has given loads up; the burst in hand is closed as it is.
    place : :py:`In(buffer_place_layout(config))`
        Where the buffer lies. Changes only while ``idle``.
    axi : :py:`Out(axi4_write_signature(config))`
        ``aw`` are registers' outputs; ``b.ready`` is always high.
    owed : :py:`Out(transfers)`
        Transfers of which a beat was taken that is not in the buffer yet: from the cycle after
        its handshake on ``fill`` until the one after the answer (B) of its burst.
    failed : :py:`Out(transfers)`
        One cycle, that of the answer: a write of this transfer had an error.
    moved : :py:`Out(1)`
        There was a handshake on AW, W or B in the cycle before.
    idle : :py:`Out(1)`
        Nothing is owed to any transfer.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise TypeError(f"config must be an EngineConfig, not {config!r}")
        self._config = config
        super().__init__(
            {
                "fill": In(stream.Signature(fill_layout(config))),
                "fill_transfer": In(config.transfer_bits),
                "fill_last": In(1),
                "drop": In(1),
                "abort": In(1),
                "place": In(buffer_place_layout(config)),
                "axi": Out(axi4_write_signature(config)),
                "owed": Out(config.transfers),
                "failed": Out(config.transfers),
                "moved": Out(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        count, index_bits = config.transfers, config.transfer_bits
        page_beats = PAGE_BYTES // config.beat_bytes
        beat_shift = (config.beat_bytes - 1).bit_length()
        # Bits of a beat's offset that lie within a page, and those above.
        low_bits = min((page_beats - 1).bit_length(), config.offset_bits)
        high_bits = config.offset_bits - low_bits
        aw, w, b = self.axi.aw, self.axi.w, self.axi.b

        def here(index: Value, condition: Value) -> Value:
            """Bit ``index`` of ``count`` bits, when ``condition``."""
            return Cat((index == t) & condition for t in range(count))

        # A beat goes through a register first: `fill` comes out of LUT RAM.
        beat_layout = data.StructLayout(
            {
                "transfer": index_bits,
                "slot": config.slot_bits,
                "offset": config.offset_bits,
                "last": 1,
            }
        )
        staged = Signal()
        staged_here = Signal(count)
        beat = Signal(beat_layout)
        word = Signal(config.axi_data_width)
        step = Signal()
        """The staged beat, if any, goes on."""
        taken = Signal()
        dropped, dropped_transfer = Signal(), Signal(index_bits)
        aborted = Signal()
        ends = Signal()
        """The staged beat is the last that its burst can have."""
        m.d.comb += [
            self.fill.ready.eq(~staged | step),
            taken.eq(self.fill.valid & self.fill.ready),
            ends.eq(beat.last | (dropped & (dropped_transfer == beat.transfer)) | aborted),
        ]
        m.d.sync += [
            dropped.eq(self.drop),
            dropped_transfer.eq(self.fill_transfer),
            aborted.eq(self.abort),
        ]
        with m.If(taken):
            m.d.sync += [
                beat.transfer.eq(self.fill_transfer),
                beat.slot.eq(self.fill.payload.slot),
                beat.offset.eq(self.fill.payload.offset),
                beat.last.eq(self.fill_last),
                word.eq(self.fill.payload.data),
            ]
        with m.Elif(staged & ~step):
            m.d.sync += beat.last.eq(ends)
        with m.If(self.fill.ready):
            m.d.sync += [
                staged.eq(self.fill.valid),
                staged_here.eq(here(self.fill_transfer, self.fill.valid)),
            ]

        # The burst in hand. Its data is in the queue already; `length` is AXI's, one less than
        # its beats.
        burst_layout = data.StructLayout(
            {
                "transfer": index_bits,
                "slot": config.slot_bits,
                "offset": config.offset_bits,
                "length": 8,
            }
        )
        m.submodules.words = words = fifo.SyncFIFOBuffered(
            width=config.axi_data_width, depth=max(LEAST_DATA_DEPTH, 2 * config.burst_beats)
        )
        m.submodules.closed = closed = HeadQueue(burst_layout, depth=config.max_outstanding)
        burst = Signal(burst_layout)
        open_, full = Signal(), Signal()
        """There is a burst in hand; it takes no more beats."""
        following = Signal(config.offset_bits)
        length = Signal(8)
        continues = Signal()
        m.d.comb += [
            continues.eq(
                open_ & ~full & (beat.transfer == burst.transfer) & (beat.offset == following)
            ),
            length.eq(0),
            step.eq(words.w_rdy & closed.i.ready),
            words.w_data.eq(word),
            words.w_en.eq(staged & step),
            closed.i.payload.eq(burst),
            closed.i.valid.eq(open_ & (full | (staged & step & ~continues))),
        ]
        with m.If(continues):
            m.d.comb += length.eq(burst.length + 1)
        at_page_end = beat.offset[:low_bits].all() if high_bits else 0
        with m.If(staged & step):
            m.d.sync += [
                open_.eq(1),
                burst.length.eq(length),
                following.eq(beat.offset + 1),
                full.eq(ends | at_page_end | (length == config.burst_beats - 1)),
            ]
            with m.If(~continues):
                m.d.sync += [
                    burst.transfer.eq(beat.transfer),
                    burst.slot.eq(beat.slot),
                    burst.offset.eq(beat.offset),
                ]
        with m.Elif(closed.i.valid & closed.i.ready):
            m.d.sync += open_.eq(0)
        with m.Elif(staged & continues):
            pass  # it ends with the staged beat
        with m.Elif(aborted | (dropped & (dropped_transfer == burst.transfer))):
            m.d.sync += full.eq(1)

        # Addresses: the slot's place is multiplied in one cycle, added in the next.
        place = self.place
        outstanding = Signal(range(config.max_outstanding + 1))
        chosen = Signal()
        answered = Signal()
        address_free, product_free = Signal(), Signal()
        product_valid = Signal()
        product = Signal(len(place.base))
        first_page = Signal(len(place.base))
        within = Signal(low_bits)
        product_length = Signal(8)
        product_transfer = Signal(index_bits)
        head = closed.o.payload
        m.d.comb += [
            address_free.eq(~aw.valid | aw.ready),
            product_free.eq(~product_valid | address_free),
            closed.o.ready.eq(product_free & (outstanding != config.max_outstanding)),
            chosen.eq(closed.o.valid & closed.o.ready),
        ]
        with m.If(product_free):
            m.d.sync += [
                product_valid.eq(chosen),
                product.eq(head.slot * place.stride),
                first_page.eq(place.base + head.offset[low_bits:]),
                within.eq(head.offset[:low_bits]),
                product_length.eq(head.length),
                product_transfer.eq(head.transfer),
            ]
        with m.If(address_free):
            m.d.sync += [
                aw.valid.eq(product_valid),
                aw.payload.id.eq(product_transfer),
                aw.payload.len.eq(product_length),
                aw.payload.addr.eq(
                    ((product + first_page)[: len(product)] << (PAGE_BYTES - 1).bit_length())
                    | (within << beat_shift)
                ),
            ]

        # Data: bursts whose addresses have been chosen, in that order.
        m.submodules.lengths = lengths = HeadQueue(unsigned(8), depth=config.max_outstanding)
        sent = Signal(8)
        sends = Signal()
        m.d.comb += [
            lengths.i.valid.eq(chosen),
            lengths.i.payload.eq(head.length),
            w.valid.eq(lengths.o.valid & words.r_rdy),
            w.payload.data.eq(words.r_data),
            w.payload.last.eq(sent == lengths.o.payload),
            sends.eq(w.valid & w.ready),
            words.r_en.eq(sends),
            lengths.o.ready.eq(sends & w.payload.last),
        ]
        with m.If(sends):
            m.d.sync += sent.eq(sent + 1)
            with m.If(w.payload.last):
                m.d.sync += sent.eq(0)

        # What each transfer is owed: bursts from their first beat to their answer.
        most = 2 + 2 * closed_room(config) + config.max_outstanding
        begins = Signal()
        m.d.comb += begins.eq(staged & step & ~continues)
        begun_here = here(beat.transfer, begins)
        answered_here = Signal(count)
        none = Signal(count, init=-1)
        m.d.comb += [
            b.ready.eq(1),
            answered_here.eq(here(b.payload.id, b.valid) & ~none),
            answered.eq(answered_here.any()),
            self.owed.eq(~none | staged_here),
            self.failed.eq(answered_here & b.payload.resp[ERROR_RESPONSE_BIT].replicate(count)),
            self.idle.eq(none.all() & ~staged),
        ]
        m.d.sync += [
            outstanding.eq(outstanding + chosen - answered),
            self.moved.eq((aw.valid & aw.ready) | sends | b.valid),
        ]
        for t in range(count):
            bursts = Signal(range(most + 1), name=f"bursts_{t}")
            more, fewer = Signal(name=f"more_{t}"), Signal(name=f"fewer_{t}")
            m.d.comb += [
                more.eq(begun_here[t] & ~answered_here[t]),
                fewer.eq(~begun_here[t] & answered_here[t]),
            ]
            m.d.sync += [
                bursts.eq(bursts + more - fewer),
                none[t].eq((none[t] & ~begun_here[t]) | (fewer & (bursts == 1))),
            ]
        return m


def closed_room(config: EngineConfig) -> int:
    """Closed bursts that may wait for their address at most, generously."""
    return 2 * max(2, config.max_outstanding)
