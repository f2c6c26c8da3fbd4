# SPDX-License-Identifier: Apache-2.0
"""Turns loads into AXI bursts: segment table, address arithmetic, the AR channel."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import NUM_SEGMENTS, PAGE_BYTES, EngineConfig

from .payloads import axi4_read_signature, segment_layout, segment_write_layout

__all__ = ["BurstSplitter"]

STRIDE_PART_BITS = 16
"""The stride is multiplied in two parts of at most so many bits, one DSP block each."""


def _without_lowest(mask: Value) -> Value:
    """``mask`` without its lowest set bit."""
    return Cat(mask[i] & mask[:i].any() for i in range(len(mask)))


class BurstSplitter(wiring.Component):
    """Splits the load that is wanted into bursts and presents them one after the other.

    The scheduler says each cycle whose bursts come next (``wanted``) and whether one may be
    presented (``room``, ``pause``). When another transfer is wanted the splitter leaves the one it
    works on and later takes it up where it stopped, however often. Nothing is presented for a
    transfer that is not wanted in the cycle before.

    A burst ends at the segment's end, at a 4 KiB boundary or after ``max_burst`` beats (any number
    of them), whichever comes first. Bases and strides are multiples of a beat: their lower bits
    are ignored. A segment is read in whole beats: of one that ends within a beat, software gives
    the beats rounded up, and the bytes behind it come along.
    There are two sets of segments, and a load keeps to the one that ``bank`` named in the cycle
    before its start, also when it starts again. Writes go to the other one, which no load that has
    bursts left to issue may have begun with.

    Timing: a load that is started in cycle c with ``start_next`` has its address on the bus in
    cycle c+3 when ``start_layer`` was the same in cycle c-2 already, else in c+4; unless in cycle
    c an address may be presented or the segment table is read for another load. The bursts of a
    segment follow each other every two cycles, a further segment costs three more, a change to
    another transfer up to nine.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    segment_write : :py:`In(stream.Signature(segment_write_layout(config)))`
        Always ready. For the set that ``bank`` does not name.
    bank : :py:`In(1)`
        The set of segments for loads that are started from the next cycle on.
    start, start_transfer, start_layer, start_expert : :py:`In`
        One cycle: this transfer is a new load of this expert. ``start_layer`` was the same in
        the cycle before, whether anything was started in it or not.
    start_offered : :py:`In(1)`
        High with every ``start``, and in few other cycles: it is known earlier. Where no ``start``
        follows, a load that is worked on begins its step anew.
    start_next : :py:`In(1)`
        If it is started, it is the one that will be wanted in the next cycle.
    start_empty : :py:`Out(1)`
        A register's output: the ``start_layer`` of the cycle before has no beats.
    start_bank : :py:`Out(1)`
        The set that a load keeps to that is started in this cycle.
    begin : :py:`In(transfers)`
        Transfers that are at their start: nothing of them has been presented.
    wanted_valid, wanted : :py:`In`
        Transfer whose bursts come next. It has bursts left.
    room : :py:`In(1)`
        One more burst of ``wanted`` may be on its way. Registers alone go into it.
    pause : :py:`In(1)`
        No address is presented in the next cycle that does not stand already.
    issued, issued_transfer : :py:`Out`
        The first cycle in which an address is presented, and whose. The next one follows two
        cycles later at the earliest, and sees what has been made of this one.
    issued_last : :py:`Out(1)`
        With ``issued``: it is the last burst of its load.
    ar : :py:`Out(stream.Signature(...))`
        AXI read address, all registers' outputs; the payload means nothing while not valid.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        transfer = config.transfer_bits
        super().__init__(
            {
                "segment_write": In(stream.Signature(segment_write_layout(config))),
                "start": In(1),
                "start_offered": In(1),
                "start_transfer": In(transfer),
                "start_layer": In(config.layer_bits),
                "start_expert": In(config.expert_bits),
                "start_next": In(1),
                "start_empty": Out(1),
                "start_bank": Out(1),
                "bank": In(1),
                "begin": In(config.transfers),
                "wanted_valid": In(1),
                "wanted": In(transfer),
                "room": In(1),
                "pause": In(1),
                "issued": Out(1),
                "issued_transfer": Out(transfer),
                "issued_last": Out(1),
                "ar": axi4_read_signature(config).members["ar"],
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        beat_shift = (config.beat_bytes - 1).bit_length()
        word_bits = config.axi_addr_width - beat_shift
        page_bits = (PAGE_BYTES // config.beat_bytes - 1).bit_length()
        burst_beats = config.burst_beats
        # Bursts of a power of two leave a page's start alone: only in its last such part is its
        # end looked for. Else it is looked for in all of the page.
        aligned = burst_beats & (burst_beats - 1) == 0
        burst_bits = (burst_beats - 1).bit_length() if aligned else page_bits

        # Segment table: rows in block RAM. Its output is slow, so it goes straight into registers,
        # and from those to the multiplier. Which rows have beats is in LUT RAM, so that the end of
        # a load is known when its last address is presented, empty rows behind it or not. `left`
        # is one less than the beats.
        stride_bits = segment_layout(config)["stride"].width - beat_shift
        # Of both, one set follows the other.
        layers = 2 << config.layer_bits
        row_layout = data.StructLayout(
            {"base": word_bits, "stride": stride_bits, "left": config.offset_bits}
        )
        m.submodules.rows = rows = Memory(shape=row_layout, depth=NUM_SEGMENTS * layers, init=[])
        rows_write = rows.write_port()
        rows_read = rows.read_port()
        m.submodules.uses = uses = Memory(shape=unsigned(NUM_SEGMENTS), depth=layers, init=[])
        uses_write = uses.write_port(granularity=1)
        uses_read = uses.read_port(domain="comb")
        written = self.segment_write.payload
        m.d.comb += [
            self.segment_write.ready.eq(1),
            rows_write.addr.eq(Cat(written.segment, written.layer, ~self.bank)),
            rows_write.data.base.eq(written.value.base[beat_shift:]),
            rows_write.data.stride.eq(written.value.stride[beat_shift:]),
            rows_write.data.left.eq(written.value.beats - 1),
            rows_write.en.eq(self.segment_write.valid),
            uses_write.addr.eq(Cat(written.layer, ~self.bank)),
            uses_write.data.eq((written.value.beats != 0).replicate(NUM_SEGMENTS)),
            uses_write.en.eq(
                Cat(self.segment_write.valid & (written.segment == i) for i in range(NUM_SEGMENTS))
            ),
            uses_read.addr.eq(Cat(self.start_layer, self.bank)),
        ]
        # What is started next is known a cycle before, so the table never waits for logic.
        near_layer = Signal(config.layer_bits)
        near_uses = Signal(NUM_SEGMENTS)
        near_bank = self.start_bank
        m.d.sync += [
            near_bank.eq(self.bank),
            near_layer.eq(self.start_layer),
            near_uses.eq(uses_read.data),
            self.start_empty.eq(uses_read.data == 0),
        ]

        # What each transfer loads, and how far it has come. `fresh`: not begun, so `progress`
        # holds nothing of it. `within`: in the middle of a segment, from `word` on.
        load_layout = data.StructLayout(
            {
                "layer": config.layer_bits,
                "bank": 1,
                "expert": config.expert_bits,
                "segments": NUM_SEGMENTS,
            }
        )
        progress_layout = data.StructLayout(
            {
                "word": word_bits,
                "left": config.offset_bits,
                "within": 1,
                "segments": NUM_SEGMENTS,
            }
        )
        m.submodules.loads = loads = Memory(shape=load_layout, depth=config.transfers, init=[])
        loads_write = loads.write_port()
        loads_read = loads.read_port(domain="comb")
        m.submodules.progress = progress = Memory(
            shape=progress_layout, depth=config.transfers, init=[]
        )
        progress_write = progress.write_port()
        progress_read = progress.read_port(domain="comb")
        fresh = Signal(config.transfers)

        # What the splitter works on, and at most one of six things that it does: read what the
        # transfer is and how far it has come; send the next row's address to the table; wait for
        # the row; multiply; present an address; go on behind it. `word` counts beats from address
        # 0; `left` is one less than the beats left in the segment; `segments` have not been begun.
        working = Signal()
        pick, look_up, wait_row = Signal(), Signal(), Signal()
        multiply, present, advance = Signal(), Signal(), Signal()
        current = Signal(config.transfer_bits)
        expert = Signal(config.expert_bits)
        segments = Signal(NUM_SEGMENTS)
        word = Signal(word_bits)
        left = Signal(config.offset_bits)
        begins = Signal()
        base = Signal(word_bits)
        low_bits = STRIDE_PART_BITS
        product_low = Signal(low_bits + config.expert_bits)
        product_high = Signal(stride_bits - low_bits + config.expert_bits)
        segment_ends = Signal()
        final = Signal()

        switch = Signal()
        issue = Signal()
        bypass = Signal()
        m.d.comb += [
            switch.eq(~working | ~self.wanted_valid | (current != self.wanted)),
            bypass.eq(self.start_offered & self.start_next & ~look_up & ~(present & self.room)),
            loads_write.addr.eq(self.start_transfer),
            loads_write.data.layer.eq(self.start_layer),
            loads_write.data.bank.eq(near_bank),
            loads_write.data.expert.eq(self.start_expert),
            loads_write.data.segments.eq(near_uses),
            loads_write.en.eq(self.start),
            loads_read.addr.eq(current),
            progress_read.addr.eq(current),
        ]

        # The table is read for the load in hand, or else for one that may start: when it does, its
        # row is on the way already.
        row_layer = Signal(config.layer_bits)
        row_bank = Signal()
        row_segments = Signal(NUM_SEGMENTS)
        row_segment = Signal(range(NUM_SEGMENTS))
        m.d.comb += [
            row_layer.eq(Mux(look_up, loads_read.data.layer, near_layer)),
            row_bank.eq(Mux(look_up, loads_read.data.bank, near_bank)),
            row_segments.eq(Mux(look_up, segments, near_uses)),
            rows_read.addr.eq(Cat(row_segment, row_layer, row_bank)),
        ]
        row = Signal(row_layout)
        row_is_of = Signal(config.layer_bits)  # the row that the table puts out is its first
        row_is_known = Signal()
        m.d.sync += [
            row.eq(rows_read.data),
            row_is_of.eq(near_layer),
            row_is_known.eq(~look_up & (near_bank == self.bank)),
        ]
        announced = row_is_known & (row_is_of == near_layer)
        for i in reversed(range(NUM_SEGMENTS)):
            with m.If(row_segments[i]):
                m.d.comb += row_segment.eq(i)

        # The first address of a segment: low part and high part at once, then the carry.
        low = Signal(low_bits + 1)
        high = Signal(word_bits - low_bits)
        here = Signal(word_bits)
        m.d.comb += [
            low.eq(base[:low_bits] + product_low[:low_bits]),
            high.eq(base[low_bits:] + (product_low[low_bits:] + product_high) + low[-1]),
            here.eq(Mux(begins, Cat(low[:-1], high), word)),
        ]

        # Length of the burst, one less than its beats as AXI has it. In a page's last `burst_beats`
        # beats the page's end limits it. A segment ends in its first burst when left + low does
        # not reach that end; of this sum, left + base has been made in the cycle before.
        def in_last(place):
            return place[burst_bits:page_bits].all() if burst_bits < page_bits else Const(1)

        def limit_at(place):
            to_end = ~place[:burst_bits]
            if aligned:
                return to_end | (~in_last(place)).replicate(burst_bits)
            return Mux(to_end < burst_beats, to_end, burst_beats - 1)

        short = Signal()  # the rest of the segment is not longer than `burst_beats`
        left_and_base = Signal(burst_bits + 1)
        left_and_low = Signal(burst_bits + 2)
        low_wraps = Signal()
        first_fits = Signal()
        ends_segment = Signal()
        length = Signal(8)
        m.d.comb += [
            short.eq(left[burst_bits:] == 0 if aligned else left < burst_beats),
            left_and_low.eq(left_and_base + product_low[:burst_bits]),
            low_wraps.eq((base[:burst_bits] + product_low[:burst_bits])[burst_bits:]),
            first_fits.eq(~in_last(low) | (left_and_low[burst_bits:] == low_wraps)),
            ends_segment.eq(Mux(begins, short & first_fits, left <= limit_at(word))),
            length.eq(Mux(ends_segment, left, limit_at(here))),
            issue.eq(present & ~switch & ~self.ar.valid & self.room & ~self.pause),
        ]
        # The payload is taken while nothing stands, whether it will be presented or not: only
        # `valid` waits for the decision.
        with m.If(present & ~self.ar.valid):
            m.d.sync += [
                self.ar.payload.id.eq(current),
                self.ar.payload.addr.eq(here << beat_shift),
                self.ar.payload.len.eq(length),
                segment_ends.eq(ends_segment),
            ]
        m.d.sync += self.ar.valid.eq(issue | (self.ar.valid & ~self.ar.ready))

        # That it was the last burst is said one cycle later, off the path of the address.
        m.d.comb += [
            final.eq(segment_ends & (segments == 0)),
            self.issued.eq(advance),
            self.issued_transfer.eq(current),
            self.issued_last.eq(final),
        ]

        advanced = Signal(progress_layout)
        m.d.comb += [
            advanced.word.eq(self.ar.payload.addr[beat_shift:] + self.ar.payload.len + 1),
            advanced.left.eq(left - self.ar.payload.len - 1),
            advanced.within.eq(~segment_ends),
            advanced.segments.eq(segments),
            progress_write.addr.eq(current),
            progress_write.data.eq(advanced),
            progress_write.en.eq(advance),
        ]
        advance_here = Cat(advance & (current == t) for t in range(config.transfers))
        m.d.sync += fresh.eq((fresh & ~advance_here) | self.begin)

        # Next state. What one step needs of the step before is kept whether a switch comes or not.
        picked = progress_read.data
        picked_fresh = fresh.bit_select(current, 1)
        with m.If(pick):
            m.d.sync += [
                expert.eq(loads_read.data.expert),
                word.eq(picked.word),
                left.eq(picked.left),
                segments.eq(Mux(picked_fresh, loads_read.data.segments, picked.segments)),
                begins.eq(0),
            ]
        with m.If(look_up):
            m.d.sync += segments.eq(_without_lowest(segments))
        with m.If(multiply):
            m.d.sync += [
                base.eq(row.base),
                product_low.eq(row.stride[:low_bits] * expert),
                product_high.eq(row.stride[low_bits:] * expert),
                left.eq(row.left),
                left_and_base.eq(row.left[:burst_bits] + row.base[:burst_bits]),
                begins.eq(1),
            ]
        with m.If(advance):
            m.d.sync += [word.eq(advanced.word), left.eq(advanced.left), begins.eq(0)]

        m.d.sync += [
            pick.eq(0),
            look_up.eq(0),
            wait_row.eq(0),
            multiply.eq(0),
            present.eq(0),
            advance.eq(0),
        ]
        with m.If(bypass):
            m.d.sync += [
                working.eq(self.start),
                wait_row.eq(self.start & ~announced),
                multiply.eq(self.start & announced),
                current.eq(self.start_transfer),
                expert.eq(self.start_expert),
                segments.eq(_without_lowest(near_uses)),
            ]
        with m.Elif(switch):
            m.d.sync += [
                working.eq(self.wanted_valid),
                pick.eq(self.wanted_valid),
                current.eq(self.wanted),
            ]
        with m.Else():
            m.d.sync += [
                working.eq(~(advance & final)),
                look_up.eq(
                    (pick & (picked_fresh | ~picked.within)) | (advance & segment_ends & ~final)
                ),
                wait_row.eq(look_up),
                multiply.eq(wait_row),
                present.eq(
                    (pick & ~picked_fresh & picked.within)
                    | multiply
                    | (present & ~issue)
                    | (advance & ~segment_ends)
                ),
                advance.eq(issue),
            ]
        return m
