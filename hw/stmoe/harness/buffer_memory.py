# SPDX-License-Identifier: Apache-2.0
"""An expert buffer behind AXI4 in hardware: writes with a latency and stalls."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from stmoe.harness.content_checker import observed
from stmoe.harness.random_stall import RandomStall
from stmoe.head_queue import HeadQueue
from stmoe.payloads import axi4_write_signature, fill_layout
from stmoe_golden.config import EngineConfig

__all__ = ["BufferMemory", "BufferPlace"]


class BufferPlace:
    """Where the harness keeps the expert buffer: in the upper half of the addresses, slots a power
    of two apart, so that an address tells its slot.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Attributes
    ----------
    base, stride : int
        What software programs into BUFFER_BASE and SLOT_STRIDE, in bytes.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.stride = 1 << (config.least_stride - 1).bit_length()
        self.base = 1 << (config.axi_addr_width - 1)
        self.slot_shift = self.stride.bit_length() - 1
        if config.num_slots * self.stride > self.base:
            raise ValueError(
                f"{config.num_slots} slots of {self.stride} bytes do not fit in half of "
                f"{config.axi_addr_width} address bits"
            )


class BufferMemory(wiring.Component):
    """Takes AXI4 writes; a burst is in the memory only just before its answer.

    Nothing is stored: what is written is shown on ``written``, beat by beat, for a
    :class:`ContentChecker` to keep. The beats of a burst are shown ``latency`` cycles after its
    address was taken at the earliest, one a cycle, and its answer comes after the last of them; so
    whoever grants an expert before its writes are answered grants what is not there. Bursts are
    answered in order, never with an error.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    axi : :py:`In(axi4_write_signature(config))`
    latency : :py:`In(24)`
    jitter : :py:`In(32)`
        Seed of random stalls of all three channels; 0 for none.
    written : :py:`Out(observed(fill_layout(config)))`
        A beat that is in the memory from now on; ``ready`` is always high.
    outside : :py:`Out(1)`
        In the cycle of a handshake on AW: it is not in the buffer.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._place = BufferPlace(config)
        super().__init__(
            {
                "axi": In(axi4_write_signature(config)),
                "latency": In(24),
                "jitter": In(32),
                "written": Out(observed(fill_layout(config))),
                "outside": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, place = self._config, self._place
        aw, w, b = self.axi.aw, self.axi.w, self.axi.b
        beat_shift = (config.beat_bytes - 1).bit_length()
        depth = config.max_outstanding

        stalls = {}
        for salt, name in enumerate(("aw", "w", "b"), start=5):
            m.submodules[f"{name}_stall"] = stalls[name] = RandomStall(salt)
            m.d.comb += stalls[name].seed.eq(self.jitter)

        now = Signal(32)
        m.d.sync += now.eq(now + 1)
        burst_layout = data.StructLayout(
            {
                "id": config.transfer_bits,
                "slot": config.slot_bits,
                "offset": config.offset_bits,
                "due": len(now),
            }
        )
        m.submodules.bursts = bursts = HeadQueue(burst_layout, depth=depth)
        m.submodules.words = words = SyncFIFOBuffered(
            width=config.axi_data_width + 1, depth=depth * config.burst_beats + 1
        )
        m.submodules.answers = answers = HeadQueue(unsigned(config.transfer_bits), depth=depth)
        address = aw.payload.addr
        m.d.comb += [
            aw.ready.eq(bursts.i.ready & ~stalls["aw"].stall),
            bursts.i.valid.eq(aw.valid & ~stalls["aw"].stall),
            bursts.i.payload.id.eq(aw.payload.id),
            bursts.i.payload.slot.eq(address[place.slot_shift :]),
            bursts.i.payload.offset.eq(address[beat_shift : place.slot_shift]),
            bursts.i.payload.due.eq(now + self.latency),
            self.outside.eq(
                aw.valid
                & aw.ready
                & (
                    (address < place.base)
                    | ((address - place.base) >> place.slot_shift >= config.num_slots)
                )
            ),
            w.ready.eq(words.w_rdy & ~stalls["w"].stall),
            words.w_en.eq(w.valid & w.ready),
            words.w_data.eq(Cat(w.payload.data, w.payload.last)),
        ]

        burst = bursts.o.payload
        place_in_burst = Signal(8)
        moves, last = Signal(), Signal()
        m.d.comb += [
            last.eq(words.r_data[-1]),
            moves.eq(bursts.o.valid & words.r_rdy & ~(now - burst.due)[-1] & answers.i.ready),
            words.r_en.eq(moves),
            bursts.o.ready.eq(moves & last),
            answers.i.valid.eq(moves & last),
            answers.i.payload.eq(burst.id),
            self.written.valid.eq(moves),
            self.written.ready.eq(1),
            self.written.payload.slot.eq(burst.slot),
            self.written.payload.offset.eq(burst.offset + place_in_burst),
            self.written.payload.data.eq(words.r_data[:-1]),
        ]
        with m.If(moves):
            m.d.sync += place_in_burst.eq(Mux(last, 0, place_in_burst + 1))

        with m.If(~b.valid | b.ready):
            m.d.comb += answers.o.ready.eq(~stalls["b"].stall)
            m.d.sync += [
                b.valid.eq(answers.o.valid & ~stalls["b"].stall),
                b.payload.id.eq(answers.o.payload),
            ]
        return m
