# SPDX-License-Identifier: Apache-2.0
"""Turns loads into AXI bursts: segment table, address arithmetic, the AR channel."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import NUM_SEGMENTS, EngineConfig

from .payloads import axi4_read_signature, segment_layout, segment_write_layout

__all__ = ["BurstSplitter"]

PAGE_BYTES = 4096
"""No AXI burst crosses a multiple of this."""

STRIDE_PART_BITS = 16
"""The stride is multiplied in two parts of at most so many bits, one DSP block each."""


def _without_lowest(mask: Value) -> Value:
    """``mask`` without its lowest set bit."""
    return Cat(mask[i] & mask[:i].any() for i in range(len(mask)))


class BurstSplitter(wiring.Component):
    """Splits the load that is wanted into bursts and presents them one after the other.

    The scheduler says each cycle whose bursts come next (``wanted``) and whether one may be
    presented (``allow``). The splitter follows at once: when another transfer is wanted, it
    leaves the one it works on and later takes it up where it stopped, however often. Nothing is
    presented for a transfer that is not wanted in that cycle.

    A burst ends at the segment's end, at a 4 KiB boundary or after ``max_burst`` beats, whichever
    comes first. Bases and strides are multiples of a beat: their lower bits are ignored.
    A layer's rows may change only while none of its loads has bursts left to issue.

    Timing: a load that is started in cycle c with ``start_next`` has its address on the bus in
    cycle c+3. The bursts of a segment follow each other every two cycles, a further segment costs
    two more, a change to another transfer up to seven.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    segment_write : :py:`In(stream.Signature(segment_write_layout(config)))`
        Always ready.
    start, start_transfer, start_layer, start_expert : :py:`In`
        One cycle: this transfer is a new load of this expert.
    start_next : :py:`In(1)`
        With ``start``: it is the one that will be wanted in the next cycle.
    start_empty : :py:`Out(1)`
        Combinational from ``start_layer``: the layer has no beats.
    restart, restart_transfer : :py:`In`
        One cycle: this transfer begins again from the start.
    wanted_valid, wanted : :py:`In`
        Transfer whose bursts come next. It has bursts left.
    allow : :py:`In(1)`
        An address of ``wanted`` may be presented from the next cycle on.
    issued, issued_transfer : :py:`Out`
        The first cycle in which an address is presented, and whose. The next one follows two
        cycles later at the earliest, and sees what has been made of this one.
    issued_last : :py:`Out(1)`
        With ``issued``: it is the last burst of its load.
    ar : :py:`Out(stream.Signature(...))`
        AXI read address, all registers' outputs.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        transfer = config.transfer_bits
        super().__init__(
            {
                "segment_write": In(stream.Signature(segment_write_layout(config))),
                "start": In(1),
                "start_transfer": In(transfer),
                "start_layer": In(config.layer_bits),
                "start_expert": In(config.expert_bits),
                "start_next": In(1),
                "start_empty": Out(1),
                "restart": In(1),
                "restart_transfer": In(transfer),
                "wanted_valid": In(1),
                "wanted": In(transfer),
                "allow": In(1),
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
        burst_bits = (config.max_burst - 1).bit_length()

        # Segment table: rows in block RAM, except for the strides, which go on to a multiplier
        # at once and so cannot wait for block RAM's slow output. Which rows have beats is in
        # LUT RAM, so that the end of a load is known when its last address is presented, empty
        # rows behind it or not.
        row_bits = config.layer_bits + (NUM_SEGMENTS - 1).bit_length()
        stride_bits = segment_layout(config)["stride"].width - beat_shift
        depth = NUM_SEGMENTS * config.num_layers
        row_layout = data.StructLayout({"base": word_bits, "beats": config.offset_bits})
        m.submodules.rows = rows = Memory(shape=row_layout, depth=depth, init=[])
        rows_write = rows.write_port()
        rows_read = rows.read_port()
        m.submodules.strides = strides = Memory(
            shape=unsigned(stride_bits), depth=depth, init=[], attrs={"ram_style": "distributed"}
        )
        strides_write = strides.write_port()
        strides_read = strides.read_port()
        m.submodules.uses = uses = Memory(
            shape=unsigned(NUM_SEGMENTS), depth=config.num_layers, init=[]
        )
        uses_write = uses.write_port(granularity=1)
        uses_read = uses.read_port(domain="comb")
        written = self.segment_write.payload
        m.d.comb += [
            self.segment_write.ready.eq(1),
            rows_write.addr.eq(Cat(written.segment, written.layer)),
            rows_write.data.base.eq(written.value.base[beat_shift:]),
            rows_write.data.beats.eq(written.value.beats),
            rows_write.en.eq(self.segment_write.valid),
            strides_write.addr.eq(rows_write.addr),
            strides_write.data.eq(written.value.stride[beat_shift:]),
            strides_write.en.eq(rows_write.en),
            uses_write.addr.eq(written.layer),
            uses_write.data.eq((written.value.beats != 0).replicate(NUM_SEGMENTS)),
            uses_write.en.eq(
                Cat(self.segment_write.valid & (written.segment == i) for i in range(NUM_SEGMENTS))
            ),
            uses_read.addr.eq(self.start_layer),
            self.start_empty.eq(uses_read.data == 0),
        ]

        # What each transfer loads, and how far it has come. `fresh`: not begun, so `progress`
        # holds nothing of it. `within`: in the middle of a segment, from `word` on.
        load_layout = data.StructLayout(
            {"layer": config.layer_bits, "expert": config.expert_bits, "segments": NUM_SEGMENTS}
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

        # What the splitter works on. `word` counts beats from address 0; `left` is one less than
        # the beats left in the segment; `segments` have not been begun.
        class State(enum.Enum):
            IDLE = 0
            LOOK_UP = 1
            ROW = 2
            ISSUE = 3
            ADVANCE = 4

        state = Signal(State)
        current = Signal(config.transfer_bits)
        layer = Signal(config.layer_bits)
        expert = Signal(config.expert_bits)
        segments = Signal(NUM_SEGMENTS)
        word = Signal(word_bits)
        left = Signal(config.offset_bits)
        begins = Signal()
        base = Signal(word_bits)
        low_bits = min(STRIDE_PART_BITS, stride_bits)
        product_low = Signal(low_bits + config.expert_bits)
        product_high = Signal(stride_bits - low_bits + config.expert_bits)
        segment_ends = Signal()
        final = Signal()

        switch = Signal()
        issue = Signal()
        bypass = Signal()
        picked_segments = Signal(NUM_SEGMENTS)
        picked_within = Signal()
        m.d.comb += [
            switch.eq((state == State.IDLE) | ~self.wanted_valid | (current != self.wanted)),
            bypass.eq(self.start & self.start_next & ~issue),
            loads_write.addr.eq(self.start_transfer),
            loads_write.data.layer.eq(self.start_layer),
            loads_write.data.expert.eq(self.start_expert),
            loads_write.data.segments.eq(uses_read.data),
            loads_write.en.eq(self.start),
            loads_read.addr.eq(self.wanted),
            progress_read.addr.eq(self.wanted),
        ]
        wanted_fresh = fresh.bit_select(self.wanted, 1)
        m.d.comb += [
            picked_within.eq(~wanted_fresh & progress_read.data.within),
            picked_segments.eq(
                Mux(wanted_fresh, loads_read.data.segments, progress_read.data.segments)
            ),
        ]

        # Next row to read: of the load that starts, else the next one of the load in hand.
        row_layer = Signal(config.layer_bits)
        row_segments = Signal(NUM_SEGMENTS)
        row_segment = Signal(range(NUM_SEGMENTS))
        with m.If(self.start):
            m.d.comb += [row_layer.eq(self.start_layer), row_segments.eq(uses_read.data)]
        with m.Else():
            m.d.comb += [row_layer.eq(layer), row_segments.eq(segments)]
        for i in reversed(range(NUM_SEGMENTS)):
            with m.If(row_segments[i]):
                m.d.comb += row_segment.eq(i)
        m.d.comb += [
            rows_read.addr.eq(Cat(row_segment, row_layer)[:row_bits]),
            strides_read.addr.eq(rows_read.addr),
        ]

        # Length of the burst, one less than its beats as AXI has it.
        here = Signal(word_bits)
        limit = Signal(burst_bits)
        ends_segment = Signal()
        length = Signal(8)
        m.d.comb += [
            here.eq(Mux(begins, base + product_low + (product_high << low_bits), word)),
            limit.eq(
                ~here[:burst_bits] | (~here[burst_bits:page_bits]).any().replicate(burst_bits)
            ),
            ends_segment.eq(left <= limit),
            length.eq(Mux(ends_segment, left, limit)),
            issue.eq((state == State.ISSUE) & ~switch & ~self.ar.valid & self.allow),
        ]
        with m.If(issue):
            m.d.sync += [
                self.ar.valid.eq(1),
                self.ar.payload.id.eq(current),
                self.ar.payload.addr.eq(here << beat_shift),
                self.ar.payload.len.eq(length),
            ]
        with m.Elif(self.ar.ready):
            m.d.sync += self.ar.valid.eq(0)

        # That it was the last burst is said one cycle later, off the path of the address.
        m.d.comb += [
            final.eq(segment_ends & (segments == 0)),
            self.issued.eq(state == State.ADVANCE),
            self.issued_transfer.eq(current),
            self.issued_last.eq(final),
        ]

        advanced = Signal(progress_layout)
        advance = Signal()
        m.d.comb += [
            advance.eq(state == State.ADVANCE),
            advanced.word.eq(word + self.ar.payload.len + 1),
            advanced.left.eq(left - self.ar.payload.len - 1),
            advanced.within.eq(~segment_ends),
            advanced.segments.eq(segments),
            progress_write.addr.eq(current),
            progress_write.data.eq(advanced),
            progress_write.en.eq(advance),
        ]
        advance_here = Signal(config.transfers)
        begin_here = Signal(config.transfers)
        m.d.comb += [
            advance_here.eq(Cat(advance & (current == t) for t in range(config.transfers))),
            begin_here.eq(
                Cat(
                    self.start & (self.start_transfer == t)
                    | self.restart & (self.restart_transfer == t)
                    for t in range(config.transfers)
                )
            ),
        ]
        m.d.sync += fresh.eq((fresh & ~advance_here) | begin_here)

        with m.If(bypass):
            m.d.sync += [
                state.eq(State.ROW),
                current.eq(self.start_transfer),
                layer.eq(self.start_layer),
                expert.eq(self.start_expert),
                segments.eq(_without_lowest(uses_read.data)),
            ]
        with m.Elif(switch):
            m.d.sync += [
                current.eq(self.wanted),
                layer.eq(loads_read.data.layer),
                expert.eq(loads_read.data.expert),
                word.eq(progress_read.data.word),
                left.eq(progress_read.data.left),
                segments.eq(picked_segments),
                begins.eq(0),
            ]
            with m.If(~self.wanted_valid):
                m.d.sync += state.eq(State.IDLE)
            with m.Elif(picked_within):
                m.d.sync += state.eq(State.ISSUE)
            with m.Else():
                m.d.sync += state.eq(State.LOOK_UP)
        with m.Else():
            with m.Switch(state):
                with m.Case(State.LOOK_UP):
                    with m.If(~self.start):
                        m.d.sync += [
                            state.eq(State.ROW),
                            segments.eq(_without_lowest(segments)),
                        ]
                with m.Case(State.ROW):
                    row = rows_read.data
                    stride = strides_read.data
                    m.d.sync += [
                        state.eq(State.ISSUE),
                        begins.eq(1),
                        base.eq(row.base),
                        product_low.eq(stride[:low_bits] * expert),
                        product_high.eq(stride[low_bits:] * expert),
                        left.eq(row.beats - 1),
                    ]
                with m.Case(State.ISSUE):
                    with m.If(issue):
                        m.d.sync += [
                            state.eq(State.ADVANCE),
                            word.eq(here),
                            segment_ends.eq(ends_segment),
                        ]
                with m.Case(State.ADVANCE):
                    m.d.sync += [word.eq(advanced.word), left.eq(advanced.left), begins.eq(0)]
                    with m.If(final):
                        m.d.sync += state.eq(State.IDLE)
                    with m.Elif(segment_ends):
                        m.d.sync += state.eq(State.LOOK_UP)
                    with m.Else():
                        m.d.sync += state.eq(State.ISSUE)
        return m
