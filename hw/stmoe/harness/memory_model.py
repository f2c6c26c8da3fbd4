# SPDX-License-Identifier: Apache-2.0
"""A memory tier in hardware: AXI4 reads with a latency, a bandwidth, errors and silence."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value, ValueLike
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from stmoe.payloads import axi4_read_signature
from stmoe_golden.config import EngineConfig

__all__ = ["MemoryModel", "address_of", "beat_at", "content", "half_at", "word_at"]

WORD_BYTES = 8
WORD_BITS = 8 * WORD_BYTES
WORD_SHIFT = 3
MIX_SHIFT = 22
MIX_KEY = 0x9E3779B97F4A7C15
HALF_BITS, HALF_SHIFT, HALF_MIX = 32, 2, 11
HALF_KEY = MIX_KEY >> HALF_BITS
OKAY, SLVERR = 0, 2


def word_at(address: int) -> int:
    """The 64-bit word at byte ``address`` (rounded down to a word), in plain Python.

    With ``w = address >> 3`` it is ``w ^ (w << 22) ^ (w << 44) ^ 0x9E3779B97F4A7C15``, modulo
    2**64. Over GF(2) that is a multiplication by ``1 + s + s*s`` with ``s`` a shift by 22, whose
    inverse is ``1 + s`` (as ``s*s*s`` leaves nothing in 64 bits): no two words are alike.
    """
    word = address >> WORD_SHIFT
    mixed = word ^ (word << MIX_SHIFT) ^ (word << 2 * MIX_SHIFT) ^ MIX_KEY
    return mixed & ((1 << WORD_BITS) - 1)


def half_at(address: int) -> int:
    """The 32-bit word at byte ``address`` of a memory 32 bits wide, in plain Python.

    As :func:`word_at`, with half of all widths: no two words of 16 GiB are alike.
    """
    word = address >> HALF_SHIFT
    mixed = word ^ (word << HALF_MIX) ^ (word << 2 * HALF_MIX) ^ HALF_KEY
    return mixed & ((1 << HALF_BITS) - 1)


def beat_at(address: int, data_width: int) -> int:
    """The beat at byte ``address`` (a multiple of the beat), in plain Python."""
    if data_width == HALF_BITS:
        return half_at(address)
    words = range(data_width // WORD_BITS)
    return sum(word_at(address + i * WORD_BYTES) << i * WORD_BITS for i in words)


def content(address: ValueLike, *, data_width: int = WORD_BITS) -> Value:
    """The beat of ``data_width`` bits at byte ``address`` (a multiple of the beat), in hardware.

    Words are those of :func:`word_at`, the one of the lowest address in the lowest bits; where a
    beat has 32 bits, those of :func:`half_at`.
    """
    address = Value.cast(address)
    if data_width == HALF_BITS:
        word = address[HALF_SHIFT:]
        return (word ^ (word << HALF_MIX) ^ (word << 2 * HALF_MIX) ^ HALF_KEY)[:HALF_BITS]
    words = data_width // WORD_BITS
    skip = WORD_SHIFT + (words - 1).bit_length()
    result = []
    for i in range(words):
        word = Cat(*((i >> bit) & 1 for bit in range(skip - WORD_SHIFT)), address[skip:])
        result.append((word ^ (word << MIX_SHIFT) ^ (word << 2 * MIX_SHIFT) ^ MIX_KEY)[:WORD_BITS])
    return Cat(*result)


def address_of(beat: ValueLike) -> Value:
    """Byte address of a beat, from its data: the inverse of :func:`content`, in hardware; of a
    beat of 32 bits, modulo 16 GiB."""
    if len(Value.cast(beat)) == HALF_BITS:
        mixed = Value.cast(beat) ^ HALF_KEY
        return Cat(0, 0, (mixed ^ (mixed << HALF_MIX))[:HALF_BITS])
    mixed = Value.cast(beat)[:WORD_BITS] ^ MIX_KEY
    return Cat(0, 0, 0, (mixed ^ (mixed << MIX_SHIFT))[: WORD_BITS - WORD_SHIFT])


class MemoryModel(wiring.Component):
    """Answers AXI4 reads; what lies at an address is a function of the address (:func:`content`).

    Synthesizable, so that the same memory serves cocotb, compiled runs and the board. All other
    inputs are settings: registers or constants, which may change at any time unless it says
    otherwise.

    **Order.** Bursts are answered in the order of their addresses. With ``reorder`` a next burst
    is drawn at random among the IDs that have one whose latency is over; with ``interleave`` as
    well, a new ID is drawn after every beat. Those of one ID always stay in order. ``reorder``
    and ``interleave`` change only while nothing is outstanding.

    **Latency.** The first beat of a burst is on the bus ``latency`` cycles after the handshake of
    its address at the earliest (0 counts as 1; two more with ``reorder``), and later if the beats
    before it take longer. Bursts overlap: with enough of them there is no gap between beats.

    **Bandwidth.** ``beats_numerator`` beats in ``beats_denominator`` cycles, spread evenly. Time
    in which nothing is sent is saved up for ``numerator`` beats at most. Equal values, or more
    beats than cycles, give full bandwidth. A numerator of 0 stops it.

    **Errors.** A beat that holds byte ``error_address`` comes with SLVERR and inverted data,
    for the first ``error_count`` such beats since ``error_count`` was last 0.

    **Silence.** While ``stuck`` is high no new beat is put on the bus; a beat that stands there
    stays. While ``stuck_address`` is high no address is taken.

    Parameters
    ----------
    config : :class:`EngineConfig`
    depth : :class:`int`
        Bursts that it accepts before it has answered them; by default ``max_outstanding``.

    Members
    -------
    axi : :py:`In(axi4_read_signature(config))`
        ``r.valid`` and its payload are combinational from registers and LUT RAM.
    latency : :py:`In(24)`
    beats_numerator, beats_denominator : :py:`In(16)`
        1 and 1 if not driven.
    reorder, interleave : :py:`In(1)`
    error_address, error_count : :py:`In(axi_addr_width)`, :py:`In(8)`
    stuck, stuck_address : :py:`In(1)`
    outstanding : :py:`Out(range(depth + 1))`
        Bursts accepted and not finished.
    """

    def __init__(self, config: EngineConfig, *, depth: int | None = None):
        if depth is None:
            depth = config.max_outstanding
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"depth must be an integer, not {depth!r}")
        if not 1 <= depth <= 1024:
            raise ValueError(f"depth must be 1 to 1024, not {depth}")
        self._config = config
        self._depth = depth
        super().__init__(
            {
                "axi": In(axi4_read_signature(config)),
                "latency": In(24, init=1),
                "beats_numerator": In(16, init=1),
                "beats_denominator": In(16, init=1),
                "reorder": In(1),
                "interleave": In(1),
                "error_address": In(config.axi_addr_width),
                "error_count": In(8),
                "stuck": In(1),
                "stuck_address": In(1),
                "outstanding": Out(range(depth + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self._config
        depth = self._depth
        ids = range(1 << config.transfer_bits)
        ar, r = self.axi.ar, self.axi.r
        beat_shift = (config.beat_bytes - 1).bit_length()
        word_bits = config.axi_addr_width - beat_shift

        accept = Signal()
        sent = Signal()
        finished = Signal()
        m.d.comb += [
            ar.ready.eq((self.outstanding != depth) & ~self.stuck_address),
            accept.eq(ar.valid & ar.ready),
            sent.eq(r.valid & r.ready),
            finished.eq(sent & r.payload.last),
        ]
        m.d.sync += self.outstanding.eq(self.outstanding + accept - finished)

        # The bursts of each ID, a ring of `depth` for each.
        burst_layout = data.StructLayout({"word": word_bits, "len": len(ar.payload.len)})
        ring_bits = max(1, (depth - 1).bit_length())
        m.submodules.bursts = bursts = Memory(
            shape=burst_layout, depth=len(ids) << ring_bits, init=[]
        )
        bursts_write = bursts.write_port()
        bursts_read = bursts.read_port(domain="comb")
        heads = [Signal(ring_bits, name=f"head_{i}") for i in ids]
        tails = [Signal(ring_bits, name=f"tail_{i}") for i in ids]
        tail = Signal(ring_bits)
        head = Signal(ring_bits)

        # Latency: addresses in order, each with the time from which it may be answered.
        now = Signal(32)
        m.d.sync += now.eq(now + 1)
        queued_layout = data.StructLayout({"id": config.transfer_bits, "due": len(now)})
        m.submodules.queue = queue = SyncFIFO(width=queued_layout.size, depth=depth)
        queued = Signal(queued_layout)
        arriving = Signal(queued_layout)
        ripe = Signal()
        m.d.comb += [
            arriving.id.eq(ar.payload.id),
            arriving.due.eq(now + Mux(self.latency == 0, 1, self.latency)),
            queue.w_data.eq(arriving),
            queue.w_en.eq(accept),
            queued.eq(queue.r_data),
            ripe.eq(queue.r_rdy & ~(now - queued.due)[-1]),
        ]

        # Which ID is answered: in order the oldest, else one drawn among those with ripe bursts.
        ripened = [Signal(range(depth + 1), name=f"ripened_{i}") for i in ids]
        places = [Signal(len(ar.payload.len), name=f"place_{i}") for i in ids]
        drawn = Signal(config.transfer_bits)
        drawn_valid = Signal()
        answering = Signal()
        current = Signal(config.transfer_bits)
        place = Signal(len(ar.payload.len))
        m.d.comb += [
            current.eq(Mux(self.reorder, drawn, queued.id)),
            answering.eq(Mux(self.reorder, drawn_valid, ripe)),
            queue.r_en.eq(Mux(self.reorder, ripe, finished)),
        ]
        for i in ids:
            goes_on = Signal(name=f"goes_on_{i}")
            ripens = Signal(name=f"ripens_{i}")
            m.d.comb += [
                goes_on.eq(finished & (current == i)),
                ripens.eq(self.reorder & ripe & (queued.id == i)),
            ]
            m.d.sync += ripened[i].eq(ripened[i] + ripens - (goes_on & self.reorder))
            with m.If(accept & (ar.payload.id == i)):
                m.d.sync += tails[i].eq(tails[i] + 1)
            with m.If(ar.payload.id == i):
                m.d.comb += tail.eq(tails[i])
            with m.If(current == i):
                m.d.comb += [head.eq(heads[i]), place.eq(places[i])]
            with m.If(goes_on):
                m.d.sync += [heads[i].eq(heads[i] + 1), places[i].eq(0)]
            with m.Elif(sent & (current == i)):
                m.d.sync += places[i].eq(places[i] + 1)

        # A maximal-length LFSR (taps 16, 15, 13, 4) says where the draw begins.
        random = Signal(16, init=0xACE1)
        m.d.sync += random.eq(Cat(random[15] ^ random[14] ^ random[12] ^ random[3], random))
        drawable = Signal(len(ids))
        first = Signal(config.transfer_bits)
        m.d.comb += [
            first.eq(random),
            drawable.eq(
                Cat(
                    (ripened[i] > 1) | (ripened[i] == 1) & ~(finished & (current == i)) for i in ids
                )
            ),
        ]
        over = Mux(self.interleave, sent, finished)
        with m.If(~drawn_valid | over):
            m.d.sync += drawn_valid.eq(drawable.any())
            for step in reversed(ids):
                candidate = (first + step)[: config.transfer_bits]
                with m.If(drawable.bit_select(candidate, 1)):
                    m.d.sync += drawn.eq(candidate)

        # Bandwidth: credit grows by the numerator every cycle, a beat costs the denominator.
        credit = Signal(18)
        grown = Signal(18)
        enough = Signal()
        full_speed = Signal()
        ceiling = Signal(17)
        m.d.comb += [
            full_speed.eq(self.beats_numerator >= self.beats_denominator),
            ceiling.eq(self.beats_numerator + self.beats_denominator),
            grown.eq(credit + self.beats_numerator),
            enough.eq(full_speed | (credit >= self.beats_denominator)),
        ]
        with m.If(sent):
            m.d.sync += credit.eq(Mux(full_speed, 0, grown - self.beats_denominator))
        with m.Elif(grown <= ceiling):
            m.d.sync += credit.eq(grown)
        with m.Else():
            m.d.sync += credit.eq(ceiling)

        standing = Signal()  # a beat was on the bus and was not taken, so it stays
        burst = bursts_read.data
        address = Signal(config.axi_addr_width)
        errors = Signal(len(self.error_count))
        wrong = Signal()
        wrong_before = Signal()
        wrong_now = Signal()
        m.d.comb += [
            bursts_write.addr.eq(Cat(tail, ar.payload.id)),
            bursts_write.data.word.eq(ar.payload.addr[beat_shift:]),
            bursts_write.data.len.eq(ar.payload.len),
            bursts_write.en.eq(accept),
            bursts_read.addr.eq(Cat(head, current)),
            address.eq((burst.word + place) << beat_shift),
            wrong_now.eq(
                (address[beat_shift:] == self.error_address[beat_shift:])
                & (errors != self.error_count)
            ),
            wrong.eq(Mux(standing, wrong_before, wrong_now)),
            r.valid.eq((answering & enough & ~self.stuck) | standing),
            r.payload.id.eq(current),
            r.payload.data.eq(
                content(address, data_width=config.axi_data_width)
                ^ wrong.replicate(config.axi_data_width)
            ),
            r.payload.resp.eq(Mux(wrong, SLVERR, OKAY)),
            r.payload.last.eq(place == burst.len),
        ]
        m.d.sync += [standing.eq(r.valid & ~r.ready), wrong_before.eq(wrong)]
        with m.If(self.error_count == 0):
            m.d.sync += errors.eq(0)
        with m.Elif(sent & wrong):
            m.d.sync += errors.eq(errors + 1)
        return m
