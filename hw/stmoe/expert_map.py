# SPDX-License-Identifier: Apache-2.0
"""Which expert is in which slot, and in what state."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, enum, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from stmoe_golden.config import EngineConfig

from .synthesis import ANY_ON_COLLISION, BLOCK_RAM_FROM, IN_BLOCK_RAM

__all__ = ["ExpertMap", "LaneState", "lane_bits", "pin_bits", "slot_info_layout"]


class LaneState(enum.Enum, shape=3):
    """State of one expert of one layer."""

    NONE = 0
    """Not in the buffer and not on its way."""
    LOADING_PREFETCH = 1
    LOADING_DEMAND = 2
    READY = 3
    """Resident and without pins; it has been demanded before."""
    READY_UNUSED = 4
    """Resident and without pins, loaded by a prefetch that no demand has asked for yet."""
    PINNED = 5
    """Resident, with granted pins outstanding."""


def lane_bits(config: EngineConfig) -> int:
    """Bits of an expert index inside the engine (the ports carry one more value)."""
    return max(1, (config.num_experts - 1).bit_length())


def pin_bits(config: EngineConfig) -> int:
    """Bits of a pin count: at most 4K grants are outstanding, all perhaps on one slot."""
    return (4 * config.top_k).bit_length()


def slot_info_layout(config: EngineConfig) -> data.StructLayout:
    """What is kept of a slot: its expert, its pins (while loading: grants promised)."""
    return data.StructLayout(
        {
            "resident": 1,
            "pins": pin_bits(config),
            "layer": config.layer_bits,
            "expert": lane_bits(config),
        }
    )


class ExpertMap(wiring.Component):
    """The map's memories and the slot counts of each layer.

    Three memories, each with one synchronous read port (one cycle) and one write port: the state
    of every expert (a row of E lanes per layer), the slot and transfer of every expert, and the
    expert and pins of every slot. What is written goes through a register first: a read sees the
    writes of all cycles before it but the last. Of a place, or of a slot's expert and pins, the
    synthesised map gives anything when it is read in the cycle after it was written. Beside them,
    registers count each layer's slots that are not free and its evictable ones.

    Parameters
    ----------
    config : :class:`EngineConfig`

    Members
    -------
    row_layer : In
        Read address; ``row`` holds that layer's lanes one cycle later.
    row_write, row_write_layer, row_write_lanes, row_write_data : In
        Write the lanes whose bit is set.
    place_read : In
        ``{expert, layer}``; ``place`` holds its slot and transfer one cycle later.
    place_write, place_write_address, place_write_data : In
    info_read : In
        A slot; ``info`` holds its :func:`slot_info_layout` one cycle later.
    info_write, info_write_slot, info_write_data : In
    held_add, held_sub : In
        This cycle a slot of ``held_layer`` stops or starts being free.
    ready_add, ready_sub : In
        Evictable experts gained or lost (``ready_sub``: how many) in ``ready_layer``.
    quota : In
        Slots that each layer keeps.
    over, any_ready : Out
        One bit per layer: it has more slots than its quota; it has an evictable slot. They follow
        ``held_*`` and ``ready_*`` in the second cycle, ``quota`` at once.
    settling : Out
        One of them may be about to change: there was such an input in the cycle before.
    """

    def __init__(self, config: EngineConfig):
        self.config = c = config
        eb, layers, experts = lane_bits(c), c.num_layers, c.num_experts
        self.place_layout = data.StructLayout({"slot": c.slot_bits, "transfer": c.transfer_bits})
        super().__init__(
            {
                "row_layer": In(c.layer_bits),
                "row": Out(data.ArrayLayout(LaneState, experts)),
                "row_write": In(1),
                "row_write_layer": In(c.layer_bits),
                "row_write_lanes": In(experts),
                "row_write_data": In(data.ArrayLayout(LaneState, experts)),
                "place_read": In(eb + c.layer_bits),
                "place": Out(self.place_layout),
                "place_write": In(1),
                "place_write_address": In(eb + c.layer_bits),
                "place_write_data": In(self.place_layout),
                "info_read": In(c.slot_bits),
                "info": Out(slot_info_layout(c)),
                "info_write": In(1),
                "info_write_slot": In(c.slot_bits),
                "info_write_data": In(slot_info_layout(c)),
                "held_layer": In(c.layer_bits),
                "held_add": In(1),
                "held_sub": In(1),
                "ready_layer": In(c.layer_bits),
                "ready_add": In(1),
                "ready_sub": In(range(c.top_k + 1)),
                "quota": In(data.ArrayLayout(unsigned(experts.bit_length()), layers)),
                "over": Out(layers),
                "any_ready": Out(layers),
                "settling": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        layers, experts = c.num_layers, c.num_experts

        m.submodules.rows = rows = Memory(
            shape=data.ArrayLayout(LaneState, experts), depth=layers, init=[]
        )
        row_write = rows.write_port(granularity=1)
        row_read = rows.read_port()
        m.d.comb += [
            row_read.addr.eq(self.row_layer),
            self.row.eq(row_read.data),
        ]
        # Whether at all is known late, and far from the lanes: joined behind the registers.
        written, lanes_written = Signal(), Signal(experts)
        m.d.sync += [
            row_write.addr.eq(self.row_write_layer),
            row_write.data.eq(self.row_write_data),
            written.eq(self.row_write),
            lanes_written.eq(self.row_write_lanes),
        ]
        m.d.comb += row_write.en.eq(Mux(written, lanes_written, 0))

        m.submodules.places = places = Memory(
            shape=self.place_layout,
            depth=1 << len(self.place_read),
            init=[],
            attrs=ANY_ON_COLLISION,
        )
        place_write = places.write_port()
        place_read = places.read_port()
        m.d.comb += [
            place_read.addr.eq(self.place_read),
            self.place.eq(place_read.data),
        ]
        m.d.sync += [
            place_write.addr.eq(self.place_write_address),
            place_write.data.eq(self.place_write_data),
            place_write.en.eq(self.place_write),
        ]

        # A place is the address of the next read: from block RAM, that is too late for LUT RAM.
        late = places.depth >= BLOCK_RAM_FROM
        m.submodules.infos = infos = Memory(
            shape=slot_info_layout(c),
            depth=c.num_slots,
            init=[],
            attrs=ANY_ON_COLLISION | (IN_BLOCK_RAM if late else {}),
        )
        info_write = infos.write_port()
        info_read = infos.read_port()
        m.d.comb += [
            info_read.addr.eq(self.info_read),
            self.info.eq(info_read.data),
        ]
        m.d.sync += [
            info_write.addr.eq(self.info_write_slot),
            info_write.data.eq(self.info_write_data),
            info_write.en.eq(self.info_write),
        ]

        # A counter for each layer, and before it a register for its change: it would take too long
        # to pick a counter, add to it and write it back. The change is one number for all layers,
        # so each counter is one adder.
        held_change = Signal(signed(2))
        ready_change = Signal(signed(len(self.ready_sub) + 1))
        m.d.sync += [
            held_change.eq(self.held_add - self.held_sub),
            ready_change.eq(self.ready_add - self.ready_sub),
            self.settling.eq(
                self.held_add | self.held_sub | self.ready_add | (self.ready_sub != 0)
            ),
        ]
        held, ready = [], []
        for layer in range(layers):
            holds = Signal(range(c.num_slots + 1), name=f"held_{layer}")
            can_go = Signal(range(experts + 1), name=f"ready_{layer}")
            held_here, ready_here = (
                Signal(name=f"held_in_{layer}"),
                Signal(name=f"ready_in_{layer}"),
            )
            m.d.sync += [
                held_here.eq(self.held_layer == layer),
                ready_here.eq(self.ready_layer == layer),
                holds.eq(holds + Mux(held_here, held_change, 0)),
                can_go.eq(can_go + Mux(ready_here, ready_change, 0)),
            ]
            held.append(holds)
            ready.append(can_go)
        m.d.comb += [
            self.over.eq(Cat(held[layer] > self.quota[layer] for layer in range(layers))),
            self.any_ready.eq(Cat(ready[layer] != 0 for layer in range(layers))),
        ]
        return m
